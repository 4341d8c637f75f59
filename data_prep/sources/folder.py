"""Reads image files in a folder and its sub-folders; the key is the path relative to the folder."""

import stat
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.image_files import image_suffixes, list_files
from cmscale.io.pictures import BadImage
from data_prep.sources import ImageSource, SourceKind, file_facts


def open_folder(path: Path) -> ImageSource:
    """Lists the images below a folder. Links to folders are followed, each folder is read once."""
    if not path.is_dir():
        raise UserError(f"--source folder:{path}: is not a folder")
    listing = list_files(path, image_suffixes())
    return ImageSource(
        f"folder:{path}",
        sorted([*listing.files, *listing.lost]),  # a lost one can't be read: it counts as an unusable image
        lambda: path,
        _read,
        facts=lambda root, key: file_facts(root / key),
        left_out=listing.left_out,
    )


def _read(root: Path, key: str) -> bytes:
    path = root / key
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        if path.is_symlink():
            raise BadImage("a broken link") from None
        raise
    if not is_regular:  # reading a pipe would wait for ever
        raise BadImage("not a regular file")
    return path.read_bytes()


KIND = SourceKind("DIR", open_folder)
