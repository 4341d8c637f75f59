"""Defines what a storage is: a folder of objects, on this machine or elsewhere."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cmscale.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A stored object.

    Attributes:
        key: relative to the storage's root.
        size: in bytes.
        version: differs after every change of the object.
    """

    key: str
    size: int
    version: str = field(default="", compare=False)


class ArrivedChanged(ConnectionError):
    """Raised when an object that was read differs from the checksum that the storage has for it."""


class Forbidden(UserError):
    """Raised when a storage does not allow what was asked: S3 without s3:ListBucket also a look at what is absent."""


class StorageAway(ConnectionError):
    """Raised when a storage does not answer, or says that it can't at the moment. `cmscale.io.patience` asks again."""


class Storage(Protocol):
    """A folder of objects. Keys are relative, their parts joined by `/`. Readers see a write whole or not at all.

    Every method that reaches the storage may raise UserError (missing credentials, no space left, ...), StorageAway (it
    has not answered for `storage.patience_minutes`: see `cmscale.io.patience`) and other ConnectionErrors.
    """

    url: str

    def join(self, key: str) -> str:
        """The object's full path or URL: for messages, and for `open_parent`."""
        ...

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        ...

    def read_if_present(self, key: str) -> bytes | None:
        """The object's bytes, or None if there is no such object."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Writes an object durably; it replaces an older one."""
        ...

    def write_if_absent(self, key: str, data: bytes) -> bool:
        """Writes an object unless one is there. Returns whether the object there now is `data`."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Copies a local file to `key`, durably."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local file, complete or not at all. Raises FileNotFoundError."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose keys start with `prefix`, in the order of their keys."""
        ...

    def folders(self, prefix: str = "") -> "list[str]":
        """Names of the folders at the root that start with `prefix`, sorted: the first parts of keys that have more.

        What it costs does not depend on the number of objects in them.
        """
        ...

    def delete(self, key: str) -> None:
        """Removes an object; a missing one is no error."""
        ...

    def delete_all(self, keys: Iterable[str]) -> None:
        """Removes objects, with as few requests as the storage needs; missing ones are no error.

        Raises:
            UserError: some may not be removed; others may be gone.
        """
        ...

    def sub(self, prefix: str) -> "Storage":
        """The storage whose root is `prefix` in this one."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The path of an object, or of a prefix, on a local file system; None if the storage has no local paths."""
        ...

    def check_writable(self, key: str) -> None:
        """Checks that an object can be written at `key`. Leaves nothing behind.

        Raises:
            UserError: it may not be written, or the place of the storage does not exist and can't be made.
        """
        ...

    def abort_uploads(self, is_mine: Callable[[str], bool]) -> int:
        """Ends uploads that processes began and never completed, of objects whose keys `is_mine`. Returns their number.

        Housekeeping: where the storage does not show unfinished uploads, or does not let this user end them, it says so
        in one line and does nothing.
        """
        ...
