"""Reads image files in the tar archives of a folder and its sub-folders, or in one archive; the key is TAR/MEMBER.

A tar that was cut between two members reads as a shorter tar. So an archive must end with its two blocks of zeros and
their padding, and the counts that img2dataset stores beside its tars (`NAME_stats.json`) must agree.
"""

import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cmscale.errors import UserError
from cmscale.io.image_files import HIDDEN, LeftOut, image_suffixes, is_hidden, list_files, printable
from cmscale.io.json_text import parse_json
from cmscale.io.pictures import BadImage
from data_prep.sources import REPLACED, ImageSource, SourceKind, file_facts

_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar pads its files to a multiple of this
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".tgz", ".tbz2", ".txz")
_STATS = "_stats.json"


@dataclass(frozen=True)
class _Member:
    """Where a file lies in an archive, or why it can't be read."""

    tar: Path
    offset: int = 0
    size: int = 0
    fault: str = ""


def open_tars(path: Path) -> ImageSource:
    """Lists the images in the tars, once; they are then read by offset.

    Raises:
        UserError: a tar is damaged, not complete, or compressed.
    """
    tars, stats, left_out = _files(path)
    members: dict[str, _Member] = {}
    counts: dict[str, int] = {}
    for name, tar in tars.items():
        images = _images(path, tar, left_out)
        counts[name] = len(images)
        members |= {f"{name}/{member}": found for member, found in images.items()}
    for name, file in stats.items():
        _check_stats(path, file, counts.get(name))
    return ImageSource(f"tars:{path}", sorted(members), lambda: members, _read, facts=_facts, left_out=left_out)


def _files(path: Path) -> tuple[dict[str, Path], dict[str, Path], LeftOut]:
    """The archives and img2dataset's counts, both by the archive's name without suffix; and what else is there."""
    if path.is_file():
        return {path.stem: path}, {}, LeftOut()
    listing = list_files(path, (".tar", ".json", *_COMPRESSED))
    tars, stats = {}, {}
    for name in (*listing.files, *listing.lost):
        pure = PurePosixPath(name)
        suffixes = [suffix.lower() for suffix in pure.suffixes]
        if suffixes[-1] == ".tar":
            if name in listing.lost:
                raise UserError(f"--source tars:{path}: {printable(name)} can't be read ({listing.lost[name]})")
            tars[name[: -len(".tar")]] = path / name
        elif name.endswith(_STATS) and name in listing.files:
            stats[name.removesuffix(_STATS)] = path / name
        elif ".tar" in suffixes or suffixes[-1] in (".tgz", ".tbz2", ".txz"):
            raise UserError(f"--source tars:{path}: {printable(name)} is compressed; decompress it, or move it away")
        else:
            listing.left_out.add_file(name)
    return tars, stats, listing.left_out


def _images(source: Path, tar: Path, left_out: LeftOut) -> dict[str, _Member]:
    """The images in an archive by their names in it."""
    images: dict[str, _Member] = {}
    files: dict[str, _Member] = {}
    links: dict[str, str] = {}
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if member.isreg():
                    fault = "a sparse file, which is not read" if member.issparse() else ""
                    files[member.name] = _Member(tar, member.offset_data, member.size, fault)
                if is_hidden(member.name):
                    left_out.add(HIDDEN, f"{tar.name}/{member.name}")
                elif PurePosixPath(member.name).suffix.lower() not in image_suffixes():
                    left_out.add_file(f"{tar.name}/{member.name}")
                else:
                    if member.name in images:
                        left_out.add(REPLACED, f"{tar.name}/{member.name}")
                    images[member.name] = files.get(member.name, _Member(tar, fault="no regular file"))
                    if member.islnk() or member.issym():
                        folder = "" if member.islnk() else posixpath.dirname(member.name)
                        links[member.name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            _check_end(file, archive.offset)
    except tarfile.TarError as error:
        raise UserError(
            f"--source tars:{source}: {printable(tar.name)} is not a tar, or a damaged or incomplete one ({error})"
        ) from None
    targets = {posixpath.normpath(name): found for name, found in files.items()} if links else {}
    for name, target in links.items():
        images[name] = targets.get(
            target, _Member(tar, fault=f"a link to {printable(target)}, which is not in the tar")
        )
    return images


def _check_end(file: BinaryIO, end: int) -> None:
    """Checks that what follows the last member, from byte `end` on, is the end of an archive.

    Raises:
        tarfile.ReadError: it is not.
    """
    size = file.seek(0, 2)
    file.seek(end)
    tail = file.read(2 * _BLOCK + _RECORD)
    if tail[: 2 * _BLOCK].strip(b"\0"):
        raise tarfile.ReadError(f"no header of a file at byte {end}")
    if len(tail) < 2 * _BLOCK:
        raise tarfile.ReadError("it ends without the two blocks of zeros that end a tar, so it was cut")
    if tail.strip(b"\0") or size - end >= 2 * _BLOCK + _RECORD:
        raise tarfile.ReadError(
            f"{size - end} bytes follow its last file, at byte {end}: more than the padding of a tar, so it was filled "
            f"with zeros, or is several tars in one file"
        )


def _check_stats(source: Path, stats: Path, images: int | None) -> None:
    """Compares img2dataset's count of an archive with the number of images in it; None if there is no archive."""
    try:
        successes = parse_json(stats.read_bytes())["successes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--source tars:{source}: {printable(stats.name)} states no number of successes ({error!r}); write it "
            f"again, or move it away"
        ) from None
    if images is None and successes:
        raise UserError(f"--source tars:{source}: {printable(stats.name)} counts {successes} images, but has no tar")
    if images is not None and images != successes:
        raise UserError(
            f"--source tars:{source}: {printable(stats.name)} counts {successes} images, its tar holds {images}; make "
            f"the tar again, or move both away"
        )


def _read(members: dict[str, _Member], key: str) -> bytes:
    member = members[key]
    if member.fault:
        raise BadImage(member.fault)
    with member.tar.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _facts(members: dict[str, _Member], key: str) -> str:
    member = members[key]
    return f"{member.size} bytes at {member.offset} of {file_facts(member.tar)}"


KIND = SourceKind("DIR", open_tars)
