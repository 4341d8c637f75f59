"""Holds the locks of a node's cache of shards, and counts what is in it."""

import contextlib
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import NoSpace, UserError
from cmscale.io.durable import no_space_for
from cmscale.io.locks import LockTimeout, hold
from cmscale.io.own_folder import own_folder
from cmscale.io.patience import patience_seconds

LOCK_MINUTES = 15.0


@contextmanager
def locked(path: Path, *, root: Path) -> Iterator[None]:
    """Holds a lock file in the cache `root`. Gives up after a while, so that no rank waits without end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full(root, error) from error
        raise UserError(
            f"data.cache_dir: cannot write to {path.parent} ({error.strerror}); name another folder"
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            timeout = 60 * LOCK_MINUTES + patience_seconds()  # the holder may wait for storage
            stack.enter_context(hold(path, timeout=timeout, what="data.cache_dir"))
        except LockTimeout as error:
            raise RuntimeError(str(error)) from None  # a fault of the node, not the user's mistake
        except NoSpace as error:
            raise full(root, error) from error
        yield


def make_own(root: Path) -> None:
    """Makes the folder of a cache that nobody has named, in a place that users share."""
    try:
        own_folder(root, advice="set data.cache_dir to a folder of your own")
    except NoSpace as error:
        raise full(root, error) from error


def full(root: Path, error: OSError | NoSpace) -> NoSpace:
    """The error for a cache whose disk or quota has no space left."""
    return no_space_for(f"data.cache_dir: {root}", error, advice="name a folder on a larger disk")


def lock_of(path: Path) -> Path:
    """The lock of whoever brings a file into the cache."""
    return path.with_name(f".{path.name}.lock")


def inventory(root: Path) -> tuple[int, list[tuple[int, int, Path]]]:
    """Bytes used and reserved in the cache, and its complete files as (modification time, bytes, path)."""
    complete: list[tuple[int, int, Path]] = []
    reserved: dict[Path, list[tuple[int, Path]]] = {}
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            status = path.stat()
            if not path.name.startswith("."):
                complete.append((status.st_mtime_ns, status.st_size, path))
            elif ".part" in path.name and not path.name.endswith((".lock", ".lock.held")):
                target = path.with_name(path.name.lstrip(".").rpartition(".part")[0])
                reserved.setdefault(target, []).append((status.st_size, path))
    # A download may use several temporary files: the longest counts.
    of_others = sum(max(parts)[0] for target, parts in reserved.items() if not _removed_as_left(target, parts))
    return sum(length for _, length, _ in complete) + of_others, complete


def _removed_as_left(target: Path, parts: list[tuple[int, Path]]) -> bool:
    """Removes what a killed process left of a download: nobody holds its lock. Returns whether that was so."""
    with contextlib.suppress(LockTimeout), hold(lock_of(target), timeout=0, what="data.cache_dir"):
        for _, path in parts:
            path.unlink(missing_ok=True)
        return True
    return False
