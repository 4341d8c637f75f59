"""Reads image files in a zip archive; the key is the member's name."""

import zipfile
from pathlib import Path, PurePosixPath

from cmscale.io.image_files import HIDDEN, LeftOut, image_suffixes, is_hidden
from cmscale.io.reading import check_regular, reading
from data_prep.sources import REPLACED, ImageSource, SourceKind


def open_zip(path: Path) -> ImageSource:
    """Lists the images in a zip archive."""
    keys: set[str] = set()
    left_out = LeftOut()
    with _archive(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if is_hidden(member.filename):
                left_out.add(HIDDEN, member.filename)
            elif PurePosixPath(member.filename).suffix.lower() not in image_suffixes():
                left_out.add_file(member.filename)
            elif member.filename in keys:
                left_out.add(REPLACED, member.filename)
            else:
                keys.add(member.filename)
    return ImageSource(
        f"zip:{path}",
        sorted(keys),
        lambda: _archive(path),
        lambda archive, key: archive.read(key),
        facts=_facts,
        left_out=left_out,
    )


def _facts(archive: zipfile.ZipFile, key: str) -> str:
    member = archive.getinfo(key)
    return f"{member.file_size} bytes, CRC {member.CRC:08x}"


def _archive(path: Path) -> zipfile.ZipFile:
    with reading(f"--source zip:{path}", "a zip file"):
        return zipfile.ZipFile(check_regular(path))


KIND = SourceKind("FILE", open_zip)
