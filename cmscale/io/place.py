"""Defines the type of every option that names a place: a local path, or an object of a storage by its URL."""

import os
import re
from pathlib import Path
from typing import Any

from pydantic_core import CoreSchema, core_schema

from cmscale.errors import UserError
from cmscale.io.control_characters import has_control_characters
from cmscale.io.durable import explained
from cmscale.io.storage import SCHEMES, open_parent

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_HASH = "#sha256="
_FOLDERS = re.compile(r"(?:^|(?<=[\s(:'\"]))/(?:[^/\s]+/)+(?=[^/\s])")


class Place(str):
    """A place that a command reads or writes, as text: a local path without `~`, or a URL of a known storage.

    `file:///PATH` becomes a local path.

    Raises:
        UserError: an empty text, a storage that is not known (`gs://`), a URL without its `//` or with control
            characters, or the `~` of a user who does not exist.
    """

    __slots__ = ()

    def __new__(cls, text: str | Path) -> "Place":
        return super().__new__(cls, _normal(str(text)))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        del source, handler
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())

    @property
    def is_remote(self) -> bool:
        """Whether it is a URL of a storage that is not a file system."""
        return "://" in self

    def local(self, what: str) -> Path:
        """The local path.

        Args:
            what: What is read or written there, for the message: `a run's folder`.

        Raises:
            UserError: the place is a URL.
        """
        if self.is_remote:
            raise UserError(f"{self}: {what} must be on this machine's file systems; give a local path")
        return Path(self)

    def absolute(self) -> "Place":
        """The same place for a process in another folder."""
        return self if self.is_remote else Place(Path(self).absolute())

    def is_same(self, other: "Place") -> bool:
        """Whether both name one object, as far as their names and links tell."""
        if self.is_remote or other.is_remote:
            return self == other
        return os.path.realpath(self) == os.path.realpath(other)  # of a loop of links, too

    def check_output(self, *suffixes: str) -> None:
        """Checks, before any work is done, that a file can be written here. Leaves nothing behind.

        A folder that is missing is no error: it is created when the file is written.

        Args:
            suffixes: The ends that the name may have; none for any.

        Raises:
            UserError: another end, a folder or device is there, or it may not be written.
        """
        if suffixes and not self.lower().endswith(suffixes):
            raise UserError(f"{self}: the file's name must end in {' or '.join(suffixes)}")
        if self.endswith("/"):
            raise UserError(f"{self}: is a folder; name a file in it")
        storage, key = open_parent(self)
        path = storage.local_path(key)
        if path is not None:
            with explained(path):
                if path.is_dir():
                    raise UserError(f"{self}: is a folder; name a file in it")
                if path.exists() and not path.is_file():
                    raise UserError(f"{self}: is no regular file, and would be replaced; name another one")
        storage.check_writable(key)

    def read_if_present(self) -> bytes | None:
        """The object's bytes; None if there is none."""
        storage, key = open_parent(self)
        return storage.read_if_present(key)

    def write(self, data: bytes) -> None:
        """Writes the object: readers see the old one or the whole new one. Creates a missing folder.

        Raises:
            UserError: no space is left, or writing is not allowed.
        """
        storage, key = open_parent(self)
        storage.write(key, data)


def split_hash(text: str) -> tuple[str, str | None]:
    """The path or URL in `PATH#sha256=HEX`, and the hash; None for no hash. Any other `#` belongs to the name."""
    plain, found, digest = text.rpartition(_HASH)
    return (plain, digest) if found else (text, None)


def without_folders(text: str) -> str:
    """Text in which absolute local paths are shortened to their last part: where a file lay is not for publication."""
    return _FOLDERS.sub("", text)


def _normal(text: str) -> str:
    if not text.strip():
        raise UserError("an empty path; give a path or URL")
    found = _SCHEME.match(text)
    if found is not None:
        return _normal_url(text, scheme=found[1].lower(), slashes=found[2] is not None)
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser()) + ("/" if text.endswith("/") else "")
    except RuntimeError:
        user = text[1:].partition("/")[0]
        raise UserError(f"{text}: there is no user {user!r}; write the path without ~ (./~… for such a name)") from None


def _normal_url(text: str, *, scheme: str, slashes: bool) -> str:
    known = ", ".join(f"{name}://" for name in SCHEMES)
    if not slashes and scheme in SCHEMES:
        raise UserError(f"{text}: a URL begins with {scheme}://; for a local name with a colon write ./{text}")
    if not slashes:
        raise UserError(f"{text}: not a path or URL; for a local name with a colon write ./{text}")
    if scheme not in SCHEMES:
        raise UserError(f"{text}: {scheme}:// is not supported; give a local path, or one of {known}")
    rest = text.partition("://")[2]
    if scheme != "file":
        if has_control_characters(rest):
            raise UserError(f"got {text!r}; line breaks and control characters are not allowed in a URL")
        url = f"{scheme}://{rest}"
        SCHEMES[scheme](url)  # which refuses what is no URL of its kind
        return url
    path = rest.removeprefix("localhost")
    if not path.startswith("/"):
        raise UserError(f"{text}: a file URL is file:///ABSOLUTE/PATH; give that, or a path")
    return path
