"""Writes a data set's reference statistics, which evaluations compare samples with.

    python data_prep/reference.py DATASET --out FILE [--format adm|edm|edm2] [--features NETWORK]
        [--weights FILE|s3://...]

adm: `.npz` with `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`, and more arrays for the preprocessing and the features. Use
it for evaluations here, as only it keeps images, for KID, precision and recall. edm: `.npz` with `mu` and `sigma` of
Inception features. edm2: `.pkl` with `num_images` and `fid` or `fd_dinov2`; a second run with the other features adds
to it.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a script from the checkout

import numpy as np

from cmscale.config.features import feature_networks
from cmscale.config.site import use_site
from cmscale.data import read_images
from cmscale.distributed.world import choose_device
from cmscale.errors import DamagedInput, UserError, one_line
from cmscale.evaluation.features.extractor import build_features
from cmscale.evaluation.reference.reference import SUBSET, reference_from_images, subset_indices
from cmscale.evaluation.reference.registry import reference_writers
from cmscale.io.durable import explained
from cmscale.io.fetch import local_file
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest


def make_reference(
    dataset: str,
    out: Path,
    *,
    format: str,
    features: str,
    weights: str | None,
    device: str,
    limit: int | None,
    subset: int,
) -> str:
    """Measures a data set and writes `out`. Returns a line that describes it.

    Raises:
        UserError: no such data set, fewer than two images, no weights, features that the format does not hold, or the
            file can't be written.
    """
    manifest = read_dataset_manifest(open_storage(dataset))
    count = min(manifest.count, limit or manifest.count)
    writer = reference_writers()[format]
    if out.suffix != writer.suffix:
        raise UserError(f"--out {out}: must end in {writer.suffix} (--format {format})")
    if writer.networks and features not in writer.networks:
        raise UserError(f"--format {format}: holds no {features} statistics; use --format adm")
    extractor = build_features(features, weights=local_file(weights) if weights else None, device=choose_device(device))
    name = f"{manifest.source} {manifest.fingerprint[:12]}"
    writer.check(out, extractor.label, count, name)
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    reference = reference_from_images(
        _with_progress(_images(dataset, limit=count), count),
        extractor,
        name=name,
        count=count,
        preprocess=manifest.preprocess,
        encoding=manifest.encoding,
        subset=subset if writer.keeps_images else 0,
    )
    kept = subset_indices(count, subset).tolist() if writer.keeps_images else []
    with explained(out):
        writer.write(out, reference, _images(dataset, indices=kept))
    written = f"{out}: {count} images of {manifest.image_size} px, {extractor.label}"
    return f"{written}, {len(kept)} kept as arr_0" if writer.keeps_images else written


def _images(dataset: str, *, indices: list[int] | None = None, limit: int | None = None) -> Iterator[np.ndarray]:
    return (image for image, _ in read_images(dataset, indices=indices, limit=limit))


def _with_progress(images: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    from rich.progress import track

    yield from track(islice(images, count), total=count, description="features", disable=not sys.stderr.isatty())


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status: 2 for a user's mistake."""
    formats = sorted(reference_writers())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="a prepared data set: folder or s3://")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
    parser.add_argument("--format", choices=formats, default="adm", help="default: %(default)s")
    parser.add_argument("--features", choices=feature_networks(), default="inception", help="default: %(default)s")
    parser.add_argument(
        "--weights", metavar="FILE|s3://…", help="weights of the feature network (default: its download or package)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    parser.add_argument("--limit", type=int, metavar="N", help="measure only the first N images")
    parser.add_argument(
        "--subset", type=int, default=SUBSET, metavar="N", help="images that adm keeps (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        use_site()
        print(make_reference(**vars(given)))
    except (UserError, DamagedInput) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ConnectionError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {one_line(f'{os.fsdecode(error.filename)}: {error.strerror}')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
