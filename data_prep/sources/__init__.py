"""Finds and opens image sources; each module in this package is one kind of source.

A module `NAME.py` that defines `KIND`, a `SourceKind`, adds `--source NAME:PATH` to the commands. Nothing else lists
the kinds.
"""

import hashlib
import os
import pkgutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from cmscale.data.decode import BadImage
from cmscale.errors import UserError
from cmscale.io.image_files import LeftOut
from cmscale.io.place import Place
from cmscale.io.reading import mended_utf8, reason, utf8

REPLACED = "files that a later one of the same name replaces"
_EARLIER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class ImageSource:
    """Encoded images, each with a key.

    Attributes:
        name: `kind:PATH` with an absolute path, as recorded in the data set.
        keys: Sorted keys, in the data set's order.
        open: Opens what `read` needs; called once per process, because handles do not survive a fork.
        read: Maps (handle, key) to encoded bytes. Raises OSError or BadImage for an image that can't be read.
        facts: Maps (handle, key) to a text that changes with the image, without reading it: its size and time. None if
            there is no such thing.
        left_out: What is there besides the images.
    """

    name: str
    keys: list[str]
    open: Callable[[], Any]
    read: Callable[[Any, str], bytes]
    facts: Callable[[Any, str], str] | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    def digest(self) -> str:
        """SHA-256 of the keys, which shows whether two sources list the same images."""
        return hashlib.sha256("\n".join(self.keys).encode("utf-8", "surrogateescape")).hexdigest()


def as_listed_before(source: ImageSource, keys_sha256: str) -> ImageSource:
    """The source with the keys that had this hash: its own, or those of an earlier release; itself if neither has it.

    Earlier releases took fewer formats, so that a data set which one of them made or began has fewer images.
    """
    if source.digest() == keys_sha256:
        return source
    taken = [key for key in source.keys if key.lower().endswith(_EARLIER_SUFFIXES)]
    left_out = deepcopy(source.left_out)
    for key in source.keys:
        if not key.lower().endswith(_EARLIER_SUFFIXES):
            left_out.add_file(key)
    older = replace(source, keys=taken, left_out=left_out)
    return older if older.digest() == keys_sha256 else source


def file_facts(path: Path) -> str:
    """A file's size and time of modification, or that it is missing."""
    try:
        status = path.stat()
    except OSError:
        return "a missing file"
    return f"{status.st_size} bytes modified at {status.st_mtime_ns}"


@dataclass(frozen=True)
class SourceKind:
    """A kind of source.

    Attributes:
        argument: What the path names, for help texts: `DIR` or `FILE`.
        open: Opens the source at an existing path. Raises UserError if there is no such source.
    """

    argument: str
    open: Callable[[Path], ImageSource]


class SourceReader:
    """Reads a source in the current process and opens it on first use.

    Close it: LMDB refuses to open a folder twice in one process.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self._handle: tuple[int, Any] | None = None

    def __call__(self, key: str) -> bytes:
        """The encoded image.

        Raises:
            BadImage: it is not there any more, or what stores it is damaged there.
            UserError: the source is not there any more, or can't be read.
        """
        handle = self._open()
        try:
            return self.source.read(handle, key)
        except (FileNotFoundError, PermissionError) as error:
            if not Path(self.source.name.partition(":")[2]).exists():
                raise UserError(f"--source {self.source.name}: is not there any more") from None
            raise BadImage(
                "is not there any more" if isinstance(error, FileNotFoundError) else "not readable"
            ) from None
        except (OSError, MemoryError) as error:
            raise UserError(f"--source {self.source.name}: can't read {key} ({reason(error)})") from error
        except (BadImage, UserError):
            raise
        except Exception as error:  # of an archive or a database: wrong checksum, encrypted, corrupted page, …
            raise BadImage(f"can't be read ({reason(error)})") from error

    def facts(self, keys: Sequence[str]) -> str | None:
        """A hash of the facts of several images; None if the source has none. Equal facts: the images are the same."""
        if self.source.facts is None:
            return None
        handle = self._open()
        lines = (f"{key}\0{self._facts(handle, key)}\n" for key in keys)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def _facts(self, handle: Any, key: str) -> str:
        assert self.source.facts is not None, "asked by `facts`"
        try:
            return self.source.facts(handle, key)
        except Exception as error:  # of a damaged database or archive; reading the image says more
            return f"unreadable ({type(error).__name__})"

    def _open(self) -> Any:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self.source.open())
        return self._handle[1]

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle and handle[0] == os.getpid() and hasattr(handle[1], "close"):
            handle[1].close()


@cache
def source_kinds() -> dict[str, SourceKind]:
    """All kinds of sources by name."""
    kinds = {}
    for module in pkgutil.iter_modules(__path__):
        kind = getattr(import_module(f"{__name__}.{module.name}"), "KIND", None)
        if not isinstance(kind, SourceKind):
            raise TypeError(f"{__name__}.{module.name} must define KIND, a SourceKind")
        kinds[module.name] = kind
    return kinds


def source_usage() -> str:
    """What `--source` takes, for example `lsun:DIR or zip:FILE`."""
    *others, last = (f"{name}:{kind.argument}" for name, kind in sorted(source_kinds().items()))
    return f"{', '.join(others)} or {last}" if others else last


def open_source(text: str) -> ImageSource:
    """Opens the source `KIND:PATH`.

    Raises:
        UserError: there is no such kind, nothing at the path, something else at the path, or no image.
    """
    name, _, path_text = text.partition(":")
    kind = source_kinds().get(name)
    if kind is None or not path_text:
        raise UserError(f"--source {text!r}: expected {source_usage()}")
    if path_text != utf8(path_text):
        raise UserError(
            f"--source {utf8(text)}: the path is not UTF-8, which the manifest could not name; {mended_utf8()}"
        )
    try:
        path = Place(path_text).local("images that are prepared").absolute()
    except UserError as error:
        raise UserError(f"--source {text}: {error}") from None
    if not path.exists():
        raise UserError(f"--source {text}: {path} does not exist")
    try:
        source = kind.open(path)
    except PermissionError as error:
        raise UserError(f"--source {text}: not readable ({error.strerror}: {error.filename})") from None
    if not source.keys:
        besides = f" (besides images it contains {source.left_out})" if source.left_out else ""
        raise UserError(f"--source {text}: contains no images{besides}")
    return source
