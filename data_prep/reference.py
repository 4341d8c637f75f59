"""Owns a data set's reference statistics: reads a prepared data set, writes what evaluations compare samples
with.

    python data_prep/reference.py DATASET --out FILE [--format adm|edm|edm2] [--features inception|dinov2|efficientnet]
        [--weights FILE|s3://...]

adm: `.npz` with `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`, and extra keys for preprocessing and the kind of features;
the one to evaluate against here, for it keeps images for KID, precision and recall. edm: `.npz` with `mu` and `sigma`.
edm2: `.pkl` with `num_images` and `fid` or `fd_dinov2`; a second run with the other features adds to it.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

import numpy as np

from cmscale.data import read_images
from cmscale.distributed.world import choose_device
from cmscale.errors import UserError
from cmscale.evaluation.features.extractor import KINDS, build_features
from cmscale.evaluation.reference.edm2 import edm2_beside, write_edm2
from cmscale.evaluation.reference.reference import (
    SUBSET,
    reference_from_images,
    subset_indices,
    write_edm,
    write_reference,
)
from cmscale.io.durable import explained
from cmscale.io.fetch import local_file
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest

# How a format's files are called, and the features whose statistics they hold.
_FORMATS = {"adm": (".npz", KINDS), "edm": (".npz", ("inception",)), "edm2": (".pkl", ("inception", "dinov2"))}


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
    """Measures a data set, writes `out`, and says in a line what it holds.

    Raises:
        UserError: no such data set, fewer than two images, no weights, features that the format doesn't hold, no room.
    """
    manifest = read_dataset_manifest(open_storage(dataset))
    count = min(manifest.count, limit or manifest.count)
    suffix, held = _FORMATS[format]
    if out.suffix != suffix:
        raise UserError(f"--out {out}: must end in {suffix} (--format {format})")
    if features not in held:
        raise UserError(f"--format {format}: holds no {features} statistics; use --format adm")
    extractor = build_features(features, weights=local_file(weights) if weights else None, device=choose_device(device))
    name = f"{manifest.source} {manifest.fingerprint[:12]}"
    if format == "edm2":
        edm2_beside(out, features=extractor.label, count=count, source=name)  # before the work, not after
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    reference = reference_from_images(
        _shown(_images(dataset, limit=count), count),
        extractor,
        name=name,
        count=count,
        preprocess=manifest.preprocess,
        subset=subset if format == "adm" else 0,
    )
    said = f"{out}: {count} images of {manifest.image_size} px, {extractor.label}"
    with explained(out):
        if format == "edm":
            write_edm(out, reference)
            return said
        if format == "edm2":
            write_edm2(out, reference.pooled, features=extractor.label, count=count, source=name)
            return said
        kept = subset_indices(count, subset)
        write_reference(out, reference, _images(dataset, indices=kept.tolist()), num_images=len(kept))
    return f"{said}, {len(kept)} kept as arr_0"


def _images(dataset: str, *, indices: list[int] | None = None, limit: int | None = None) -> Iterator[np.ndarray]:
    return (image for image, _ in read_images(dataset, indices=indices, limit=limit))


def _shown(images: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    from rich.progress import track

    yield from track(islice(images, count), total=count, description="features", disable=not sys.stderr.isatty())


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status: 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="a prepared data set: folder or s3://")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument("--format", choices=sorted(_FORMATS), default="adm", help="adm (default), edm, edm2")
    parser.add_argument("--features", choices=KINDS, default="inception")
    parser.add_argument("--weights", metavar="FILE|s3://…", help="the features' weights (default: their home)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--limit", type=int, metavar="N", help="measure the first N images only")
    parser.add_argument("--subset", type=int, default=SUBSET, metavar="N", help="adm: images kept (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        print(
            make_reference(
                given.dataset,
                given.out,
                format=given.format,
                features=given.features,
                weights=given.weights,
                device=given.device,
                limit=given.limit,
                subset=given.subset,
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
