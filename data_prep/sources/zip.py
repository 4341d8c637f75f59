"""Reads image files in a zip archive; the key is the member's name."""

import zipfile
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.image_files import IMAGE_SUFFIXES
from data_prep.sources import ImageSource, SourceKind


def open_zip(path: Path) -> ImageSource:
    """Lists the images in a zip archive."""
    with _archive(path) as archive:
        keys = sorted({name for name in archive.namelist() if name.lower().endswith(IMAGE_SUFFIXES)})
    return ImageSource(f"zip:{path}", keys, lambda: _archive(path), lambda archive, key: archive.read(key))


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, IsADirectoryError) as error:
        raise UserError(f"--source zip:{path}: not a zip file ({error})") from None


KIND = SourceKind("FILE", open_zip)
