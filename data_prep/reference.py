"""Writes a data set's reference statistics, which evaluations compare samples with.

    python data_prep/reference.py DATASET --out FILE [--format adm|edm|edm2] [--features NETWORK]
        [--features-weights FILE|s3://...]

adm: `.npz` with `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`, and more arrays for the preprocessing and the features. Use
it for evaluations here, as only it keeps images, for KID, precision and recall. edm: `.npz` with `mu` and `sigma` of
Inception features. edm2: `.pkl` with `num_images` and `fid` or `fd_dinov2`; a second run with the other features adds
to it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a script from the checkout

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice

import numpy as np

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser, Output, check_output, whole_number
from cmscale.commands.use import USED, Use
from cmscale.config.features import feature_networks
from cmscale.config.site import use_site
from cmscale.errors import UserError
from cmscale.evaluation.reference.registry import reference_writers
from cmscale.evaluation.reference.subset import SUBSET, subset_indices
from cmscale.io import traffic
from cmscale.io.counting import counted
from cmscale.io.driver import refuse_cuda_without_driver
from cmscale.io.durable import explained
from cmscale.io.fetch import local_file
from cmscale.io.place import Place
from cmscale.io.storage import open_parent, open_storage
from cmscale.runs.manifests import read_dataset_manifest
from cmscale.runs.named_files import check_own_weights, check_weights_file


def make_reference(
    dataset: str,
    out: Place,
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
    if limit is not None and limit > count:
        print(f"warning: {dataset} holds {count} images, fewer than --samples {limit}: all are taken", file=sys.stderr)
    writer = reference_writers()[format]
    if writer.networks and features not in writer.networks:
        raise UserError(f"--format {format}: holds no {features} statistics; use --format adm")
    check_output("--out", out, Output((writer.suffix,)))
    refuse_cuda_without_driver(device)
    if weights is not None:
        check_weights_file(weights, key="--features-weights")
    else:
        check_own_weights(features)

    from cmscale.distributed.world import choose_device  # imports torch, once no mistake is left that needs none
    from cmscale.evaluation.features.extractor import build_features
    from cmscale.evaluation.reference.reference import reference_from_images

    extractor = build_features(
        features,
        weights=local_file(weights) if weights else None,
        device=choose_device(device),
        option="--features-weights FILE",
    )
    name = f"{manifest.source} {manifest.fingerprint[:12]}"
    with _local_file_of(out) as path:
        writer.check(path, extractor.label, count, name)
        reference = reference_from_images(
            _with_progress(_images(dataset, limit=count), count),
            extractor,
            name=name,
            count=count,
            preprocess=manifest.preprocess,
            encoding=manifest.encoding,
            exif=manifest.exif,
            subset=subset if writer.keeps_images else 0,
        )
        kept = subset_indices(count, subset).tolist() if writer.keeps_images else []
        with explained(path):
            images = counted(_images(dataset, indices=kept), "keeping", total=len(kept))
            writer.write(path, reference, images)
    written = f"{out}: {count} images of {manifest.image_size} px, {extractor.label}"
    return f"{written}, {len(kept)} kept as arr_0" if writer.keeps_images else written


@contextmanager
def _local_file_of(out: Place) -> Iterator[Path]:
    """A local path to write `out` at: its own, or that of a copy, which is uploaded when the block ends."""
    storage, key = open_parent(out)
    path = storage.local_path(key)
    if path is not None:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="cmscale-") as folder:
        copy = Path(folder) / key
        with suppress(FileNotFoundError):  # some formats add to what is there
            storage.download(key, copy)
        yield copy
        with traffic.showing(f"uploading {out}", copy.stat().st_size):
            storage.upload(key, copy)


def _images(dataset: str, *, indices: list[int] | None = None, limit: int | None = None) -> Iterator[np.ndarray]:
    from cmscale.data import read_images

    return (image for image, _ in read_images(dataset, indices=indices, limit=limit))


def _with_progress(images: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    return counted(islice(images, count), "features", total=count)


def command_parser() -> CommandParser:
    """The command line."""
    formats = sorted(reference_writers())
    parser = CommandParser(prog="reference.py", description=__doc__)
    parser.add("dataset", use=USED, type=Place, metavar="DATASET", help="a prepared data set: folder or s3://")
    parser.add("--out", use=USED, type=Place, required=True, metavar="FILE", help="the file to write; local or s3://")
    parser.add("--format", use=USED, choices=formats, default="adm", help="default: %(default)s")
    parser.add("--features", use=USED, choices=feature_networks(), default="inception", help="default: %(default)s")
    parser.add(
        "--features-weights",
        dest="weights",
        use=USED,
        type=Place,
        metavar="FILE|s3://…",
        help="weights of the feature network (default: its download or package)",
    )
    parser.add("--device", use=USED, choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    parser.add(
        "--samples", dest="limit", use=USED, type=whole_number(2), metavar="N", help="measure only the first N images"
    )
    parser.add(
        "--subset",
        use=Use(format=tuple(f"--format {name}" for name in formats if reference_writers()[name].keeps_images)),
        type=whole_number(1),
        default=SUBSET,
        metavar="N",
        help="images that adm keeps (default: %(default)s)",
    )
    return parser


def run(arguments: list[str]) -> None:
    """Runs the command; raises its errors."""
    use_site(interactive=False)
    options, given = command_parser().read(arguments)
    given.refuse_unused(format=f"--format {options.format}")
    print(make_reference(**vars(options)))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 1 for a fault, 2 for a user's mistake."""
    return guarded(run, arguments)


if __name__ == "__main__":
    leave(main())
