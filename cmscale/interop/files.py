"""Reads and writes weight files of any storage by way of a local path; a written file is whole or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cmscale.errors import NoSpace, UserError
from cmscale.io import traffic
from cmscale.io.durable import explained, follow_umask, sync_folder
from cmscale.io.storage import Storage, local_copy, open_parent, open_storage, stored_entry


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
        with tempfile.TemporaryDirectory(prefix=".cmscale-", dir=parent) as temporary:
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
