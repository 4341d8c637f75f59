"""Tries what runs and preparations ask of a storage, on a small object of its own."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cmscale.errors import UserError
from cmscale.io.protocol import Storage

DELETE = "delete"
_OVERWRITES = (
    "overwrites what is there although it was told not to (If-None-Match); set storage.conditional_writes=false, and "
    "never start one run or preparation twice at the same moment"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: `problem` is why it failed, in one line, or empty."""

    what: str
    problem: str = ""


def probe(storage: Storage) -> Iterator[Finding]:
    """Writes, reads, lists, writes conditionally, begins an upload in parts, and deletes, in this order.

    What depends on a write that failed is left out. Leaves nothing behind where deleting is allowed.

    Raises:
        StorageAway: the storage does not answer.
    """
    key, data = f"probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
    folder = storage.local_path("")
    made = [] if folder is None else [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield (first := _tried("write", lambda: _write(storage, key, data)))
        if not first.problem:
            yield _tried("read", lambda: _read(storage, key, data))
            yield _tried("list", lambda: _list(storage, key))
            yield _tried("write conditionally", lambda: _write_conditionally(storage, key, data))
            yield _tried("upload in parts", lambda: _none(storage.check_writable(f"{key}-in-parts")))
            yield _tried(DELETE, lambda: _none(storage.delete(key)))
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def _tried(what: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(what, attempt())
    except UserError as error:
        return Finding(what, str(error))
    except ConnectionError:
        raise
    except OSError as error:
        return Finding(what, str(error.strerror or error))


def _none(_: object) -> str:
    return ""


def _write(storage: Storage, key: str, data: bytes) -> str:
    storage.write(key, data)
    return ""


def _read(storage: Storage, key: str, data: bytes) -> str:
    return "" if storage.read(key) == data else f"{storage.join(key)}: does not give back what was written there"


def _list(storage: Storage, key: str) -> str:
    listed = [entry.key for entry in storage.list(key)]
    return "" if key in listed else f"{storage.join(key)}: was written, and is not listed"


def _write_conditionally(storage: Storage, key: str, data: bytes) -> str:
    """Over an object, which must fail, and where nothing is, which must not."""
    if storage.write_if_absent(key, data[::-1]) or storage.read(key) != data:
        return f"{storage.join(key)}: {_OVERWRITES}"
    new = f"{key}-new"
    try:
        written = storage.write_if_absent(new, data)
    finally:
        with contextlib.suppress(UserError):
            storage.delete(new)
    return "" if written else f"{storage.join(new)}: a conditional write where nothing is fails"
