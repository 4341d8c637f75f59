"""Reads image files in the tar archives of a folder; the key is TAR/MEMBER."""

import tarfile
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.image_files import IMAGE_SUFFIXES
from data_prep.sources import ImageSource, SourceKind

_Member = tuple[Path, int, int]  # the archive, offset and size of the file in it


def open_tars(path: Path) -> ImageSource:
    """Lists the images in all `*.tar` files of a folder, once; they are then read by offset."""
    members: dict[str, _Member] = {}
    for tar in sorted(path.glob("*.tar")):
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    if member.isreg() and member.name.lower().endswith(IMAGE_SUFFIXES):
                        members[f"{tar.stem}/{member.name}"] = (tar, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"--source tars:{path}: {tar.name} is not a tar, or a damaged one ({error})") from None
    return ImageSource(f"tars:{path}", sorted(members), lambda: members, _read)


def _read(members: dict[str, _Member], key: str) -> bytes:
    tar, offset, size = members[key]
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


KIND = SourceKind("DIR", open_tars)
