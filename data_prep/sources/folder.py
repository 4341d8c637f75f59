"""Reads image files in a folder and its sub-folders; the key is the path relative to the folder."""

from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.image_files import image_suffixes, list_files
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
        lambda root, key: (root / key).read_bytes(),
        facts=lambda root, key: file_facts(root / key),
        left_out=listing.left_out,
    )


KIND = SourceKind("DIR", open_folder)
