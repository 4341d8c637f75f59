"""Locks that keep processes of one or several machines apart, as files."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.storage import explained


@contextmanager
def hold(path: Path, *, timeout: float, what: str) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which ends with its holder.

    Args:
        path: The lock file; its folder is made if it is missing.
        timeout: Seconds to wait for another holder.
        what: What the lock protects, for the message.

    Raises:
        UserError: another process holds the lock for longer than `timeout`, or the file cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout
        pause = 0.001
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(f"{what}: another process has held the lock {path} for {timeout:g} s") from None
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork may have copied the descriptor: closing does not unlock
    finally:
        os.close(descriptor)
