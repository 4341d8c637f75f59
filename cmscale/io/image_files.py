"""Lists the image files of a folder, and defines which files count as images and how large an image may be.

Data preparation and evaluation list folders alike. What is not taken is counted by reason and named.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from heapq import heappop, heappush
from pathlib import Path, PurePosixPath
from typing import Literal

from cmscale.errors import UserError

Exif = Literal["apply", "ignore"]
"""What happens to the EXIF orientation of a picture."""

# 8192 x 8192: far more than any photograph of a data set, far less than what fills the memory. Pillow itself raises
# only at twice its own limit, so every reader checks the header's size before it decodes.
MAX_IMAGE_PIXELS = 1 << 26
# Pillow recognises these but cannot decode them, or runs another program to do so (EPS).
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Copies that file managers and network drives keep beside the originals. Hidden names begin with a dot: `._x.jpg` of
# Mac archives, `.ipynb_checkpoints`.
_FOLDERS_OF_COPIES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")

HIDDEN = "hidden files and folders"
READ_ALREADY = "links to folders that are read already"
FILE_READ_ALREADY = "links to files that are read already"
BROKEN_LINK = "broken links"
NOT_REGULAR = "files that are no regular files"
_NAMED = 5


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _NOT_DECODED)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of image files, lower case, with the dot."""
    from PIL import Image

    formats = {*image_formats(), "MPO"}  # MPO is opened as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_hidden(name: str) -> bool:
    """Whether a file or folder name, or any part of a path with `/`, is hidden or a copy that another program keeps."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part in _FOLDERS_OF_COPIES for part in parts)


def printable(name: str) -> str:
    """A file's name for a message: bytes that are not UTF-8, line breaks and control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


@dataclass
class LeftOut:
    """What a source contains that was not taken: by reason, the number and the first names in order."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Counts what was not taken, and keeps its name if it is among the first."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.names.setdefault(reason, [])
        if len(named) < _NAMED or name < named[-1]:
            named.append(printable(name))
            named.sort()
            del named[_NAMED:]

    def add_file(self, name: str) -> None:
        """Adds a file whose suffix is not one of those that are wanted."""
        suffix = PurePosixPath(name).suffix.lower()
        self.add(f"{suffix} files" if suffix else "files without a suffix", name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """One line, such as `.txt files: 2 (a.txt, b.txt); broken links: 1 (c.jpg)`."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            names = ", ".join(self.names[reason])
            parts.append(f"{reason}: {count} ({names}{', …' if count > _NAMED else ''})")
        return "; ".join(parts)


@dataclass(frozen=True)
class Listing:
    """The files of a folder and its sub-folders, as paths relative to it with `/`.

    Attributes:
        files: Those with a wanted suffix, sorted.
        lost: Wanted ones that can't be read, sorted: path -> reason.
        left_out: Everything else.
    """

    files: list[str]
    lost: dict[str, str]
    left_out: LeftOut


def list_files(root: Path, suffixes: Collection[str]) -> Listing:
    """Lists the files below a folder that have one of these suffixes (lower case), and are not hidden.

    Links are followed. Each folder is read once, and each file once under its own name or that of the first link to it:
    its own name comes before that of a link to it.

    Raises:
        UserError: a folder can't be read.
    """
    walk = _Walk(root, suffixes)
    walk.enter("", os.path.realpath(root))
    walk.follow_links()
    walk.take_file_links()
    return Listing(sorted(walk.files), dict(sorted(walk.lost.items())), walk.left_out)


class _Walk:
    def __init__(self, root: Path, suffixes: Collection[str]) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.suffixes = suffixes
        self.files: list[str] = []
        self.lost: dict[str, str] = {}
        self.left_out = LeftOut()
        self.links: list[str] = []
        self.file_links: list[str] = []
        self.entered: set[str] = set()

    def enter(self, folder: str, real: str) -> None:
        """Reads a folder and the real folders in it; notes links to folders for later."""
        waiting = [(folder, real)]
        while waiting:
            folder, real = waiting.pop()
            if real in self.entered:
                self.left_out.add(READ_ALREADY, f"{folder}/")
                continue
            self.entered.add(real)
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        name = f"{folder}/{entry.name}" if folder else entry.name
                        if self.take(entry, name):
                            waiting.append((name, f"{real}/{entry.name}"))
            except OSError as error:
                raise UserError(
                    f"{printable(str(self.root / folder))}: the folder can't be read ({error.strerror}), so its images "
                    f"would be missing; make it readable, or move it away"
                ) from None

    def take(self, entry: os.DirEntry[str], name: str) -> bool:
        """Sorts an entry of a folder into its list. Returns whether it is a folder to enter."""
        link = entry.is_symlink()
        try:
            folder, file = entry.is_dir(), entry.is_file()
        except OSError:  # links in a circle
            folder = file = False
        if is_hidden(entry.name):
            self.left_out.add(HIDDEN, f"{name}/" if folder else name)
        elif folder and link:
            heappush(self.links, name)
        elif folder:
            return True
        elif PurePosixPath(entry.name).suffix.lower() not in self.suffixes:
            self.left_out.add_file(name)
        elif file:
            (self.file_links if link else self.files).append(name)
        else:
            self.lost[name] = BROKEN_LINK if link else NOT_REGULAR
        return False

    def follow_links(self) -> None:
        while self.links:
            name = heappop(self.links)
            real = os.path.realpath(self.root / name)
            if real in self.entered or f"{self.real_root}/".startswith(f"{real.rstrip('/')}/"):
                self.left_out.add(READ_ALREADY, f"{name}/")
            else:
                self.enter(name, real)

    def take_file_links(self) -> None:
        """Takes the files that links name, but those that are taken already under another name."""
        taken: set[str] = set()
        for name in sorted(self.file_links):
            real = os.path.realpath(self.root / name)
            if real in taken or self._is_listed(real):
                self.left_out.add(FILE_READ_ALREADY, name)
            else:
                taken.add(real)
                self.files.append(name)

    def _is_listed(self, real: str) -> bool:
        """Whether a file is taken under its own name, as the folder that it lies in is read."""
        folder, _, name = real.rpartition("/")
        is_wanted = PurePosixPath(name).suffix.lower() in self.suffixes and not is_hidden(name)
        return is_wanted and (folder or "/") in self.entered
