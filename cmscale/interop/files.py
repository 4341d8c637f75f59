"""Reads and writes weight files of any storage by way of a local path; a written file is whole or absent."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cmscale.errors import NoSpace, UserError
from cmscale.io import traffic
from cmscale.io.durable import explained, follow_umask, sync_folder
from cmscale.io.storage import Storage, local_copy, open_parent, open_storage, stored_entry

_STAGED = ".cmscale-weights-"
_ABANDONED_SECONDS = 600.0  # without a byte; some mounts keep locks to one host


def located(source: str | Path) -> tuple[Storage, str]:
    """The storage and key of a file at a path or URL."""
    return open_parent(source)


def folder(source: str | Path | Storage) -> Storage:
    """The storage of a folder at a path or URL."""
    return open_storage(source) if isinstance(source, str | Path) else source


@contextmanager
def readable(storage: Storage, key: str) -> Iterator[Path]:
    """A local path of the object: its own, or that of a copy that is removed afterwards.

    Raises:
        UserError: there is no such object.
    """
    with ExitStack() as stack:
        entry = stored_entry(storage, key) if storage.local_path(key) is None else None
        try:
            with traffic.showing(f"downloading {storage.join(key)}", 0 if entry is None else entry.size):
                path = stack.enter_context(local_copy(storage, key))
        except FileNotFoundError:
            what = "object" if storage.local_path(key) is None else "file"
            raise UserError(f"{storage.join(key)}: no such {what}") from None
        yield path


@contextmanager
def writable(storage: Storage, key: str, *, size: int) -> Iterator[Path]:
    """A local path to write to; the object appears when the block ends without an exception.

    Args:
        size: the expected size in bytes.

    Raises:
        NoSpace: there is not enough space.
        UserError: writing is not allowed.
    """
    target = storage.local_path(key)
    parent = None if target is None else target.parent
    with explained(target or Path(tempfile.gettempdir())):
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent or Path(tempfile.gettempdir()))
        with tempfile.TemporaryDirectory(prefix=_STAGED, dir=parent) as temporary, _locked(Path(temporary)):
            free = shutil.disk_usage(temporary).free
            if free < size * 1.01:
                needed = f"{size / 2**30:.2f} GiB are needed, {free / 2**30:.2f} are free"
                raise NoSpace(f"{parent or tempfile.gettempdir()}: not enough space for {key} ({needed})")
            path = Path(temporary) / "weights"
            with traffic.showing(f"writing {key}", size), traffic.watching(Path(temporary)):
                yield path
            if target is None:
                with traffic.showing(f"uploading {storage.join(key)}", path.stat().st_size):
                    storage.upload(key, path)
                return
            with path.open("rb") as file:
                os.fsync(file.fileno())
            follow_umask(path)
            path.replace(target)
            sync_folder(target.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder while the block runs; False if another process has locked it, or the file system can't."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        is_ours = False
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        yield is_ours
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Removes what killed processes had begun to write here: each is as large as the weights."""
    for begun in parent.glob(f"{_STAGED}*"):
        with suppress(OSError):  # another user's, or removed meanwhile
            newest = max(path.stat().st_mtime for path in (begun, *begun.iterdir()))
            if time.time() - newest > _ABANDONED_SECONDS:
                with _locked(begun) as is_ours:
                    if is_ours:
                        shutil.rmtree(begun, ignore_errors=True)
