"""Holds the locks of a node's cache of shards."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.locks import LockTimeout, hold
from cmscale.io.patience import patience_seconds

LOCK_MINUTES = 15.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file. Gives up after a while, so that no rank waits without end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write to {path.parent} ({error.strerror}); name another folder"
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            timeout = 60 * LOCK_MINUTES + patience_seconds()  # the holder may wait for storage
            stack.enter_context(hold(path, timeout=timeout, what="data.cache_dir"))
        except LockTimeout as error:
            raise RuntimeError(str(error)) from None  # a fault of the node, not the user's mistake
        yield
