"""Holds the locks of a node's cache of shards."""

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
    """Holds a lock file in the cache `root`. Gives up once nothing in it has changed for a while.

    So no rank waits without end, but behind many downloads of a slow storage, each of which may wait for room.
    """
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
            _acquire(stack, path, root=root)
        except NoSpace as error:
            raise full(root, error) from error
        yield


def _acquire(stack: contextlib.ExitStack, path: Path, *, root: Path) -> None:
    state = state_of(root)
    while True:
        try:
            stack.enter_context(hold(path, timeout=60 * hold_minutes(), what="data.cache_dir"))
            return
        except LockTimeout as error:
            if state == (state := state_of(root)):
                raise RuntimeError(str(error)) from None  # a fault of the node, not the user's mistake


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


def hold_minutes() -> float:
    """How long whoever holds a lock, or has reserved room, may do so without anything going on."""
    return LOCK_MINUTES + patience_seconds() / 60  # it may wait for storage


def state_of(root: Path) -> frozenset[tuple[Path, int]]:
    """What changes while downloads into a cache go on: its files, and how much of each is on the disk."""
    found = set()
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_blocks))
    return frozenset(found)
