"""Reads finished samples from the tars that `cmscale sample --format tar` writes, in their order."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.image_set import ImageSet
from cmscale.io.json_text import parse_json
from cmscale.io.pictures import BadImage, decode_picture
from cmscale.io.reading import check_regular, read_small, reading
from cmscale.runs.sample_sets import BEGUN, RECORD, SampleSet, read_record

_LARGEST_BYTES = 1 << 28  # of one image's file


def drawn_set(folder: Path) -> SampleSet | None:
    """The record of a set that `cmscale sample` has drawn in a folder; None if the folder is of somebody else.

    Raises:
        UserError: the record is damaged, or the set is not finished.
    """
    path = folder / RECORD
    if path.is_file():
        raw = read_small(path, what="a record of samples")
        if not _is_of_another_program(raw):
            return read_record(raw, origin=str(path))
    if Path(f"{folder}.parts", BEGUN).is_file():
        raise UserError(f"{folder}: is not drawn to its end; the command that began it goes on if it is given again")
    return None


def _is_of_another_program(raw: bytes) -> bool:
    """Whether a file of a record's name is sound JSON that says something else: other programs use the name, too."""
    try:
        found = parse_json(raw)
    except ValueError:
        return False
    return not isinstance(found, dict) or "sha256" not in found


def check_sets_below(folder: Path) -> None:
    """Checks that sets in subfolders, such as those of several seeds, are whole.

    Raises:
        UserError: one is damaged, not finished, or holds another number of files than its record says.
    """
    begun = {Path(str(each.parent).removesuffix(".parts")) for each in folder.rglob(f"*.parts/{BEGUN}")}
    for each in sorted(begun | {record.parent for record in folder.rglob(f"*/{RECORD}")}):
        drawn = drawn_set(each)
        if drawn is None or drawn.format != "png":
            continue
        if (count := sum(1 for _ in each.rglob("*.png"))) != drawn.count:
            raise UserError(f"{each}: holds {count} images, its {RECORD} says {drawn.count}; draw the samples again")


def open_tars(folder: Path, record: SampleSet) -> ImageSet:
    """Opens a finished set of tars."""
    size = record.image_size
    return ImageSet(str(folder), record.count, size, size, lambda: _read(folder, record), encoding="png")


def _read(folder: Path, record: SampleSet) -> Iterator[np.ndarray]:
    count = 0
    for path in sorted(folder.glob("samples-*.tar")):
        for data in _members(path):
            try:
                pixels = decode_picture(data, exif="ignore").pixels
            except BadImage as error:
                raise UserError(
                    f"{path}: holds an image that can't be read ({error}); draw the samples again"
                ) from None
            if pixels.shape[:2] != (record.image_size, record.image_size):
                raise UserError(f"{path}: holds an image of another size than {RECORD} says; draw the samples again")
            count += 1
            yield pixels
    if count != record.count:
        raise UserError(f"{folder}: holds {count} samples, {RECORD} says {record.count}; draw the samples again")


def _members(path: Path) -> Iterator[bytes]:
    with reading(path, "a tar of samples", advice="draw the samples again"):
        tar = tarfile.open(check_regular(path), "r:")  # noqa: SIM115
    with tar:
        while True:
            with reading(path, "a tar of samples", advice="draw the samples again"):
                member = tar.next()
                if member is None:
                    return
                file = tar.extractfile(member)
                if file is None or member.size > _LARGEST_BYTES:
                    raise ValueError("a member that is no image")
                data = file.read()
            yield data
