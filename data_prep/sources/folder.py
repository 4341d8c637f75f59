"""Reads image files in a folder and its sub-folders; the key is the path relative to the folder."""

from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.image_files import IMAGE_SUFFIXES
from data_prep.sources import ImageSource, SourceKind


def open_folder(path: Path) -> ImageSource:
    """Lists the images below a folder."""
    if not path.is_dir():
        raise UserError(f"--source folder:{path}: is not a folder")
    keys = sorted(
        found.relative_to(path).as_posix()
        for found in path.rglob("*")
        if found.suffix.lower() in IMAGE_SUFFIXES and found.is_file()
    )
    return ImageSource(f"folder:{path}", keys, lambda: path, lambda root, key: (root / key).read_bytes())


KIND = SourceKind("DIR", open_folder)
