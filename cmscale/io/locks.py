"""Locks that keep processes apart, as files: flock where the file system has it, else an exclusively created file."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from cmscale.errors import UserError
from cmscale.io.durable import explained

_POLL_SECONDS = 0.02
# Lustre mounted without `-o flock`, some FUSE and NFS mounts.
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class LockTimeout(UserError):
    """Raised when another process keeps a lock for longer than the caller waits."""


@contextmanager
def hold(path: Path, *, timeout: float, what: str, by_creation: bool = False) -> Iterator[None]:
    """Holds the exclusive lock `path` while the block runs.

    The kernel frees a flock when its holder ends. Processes forked meanwhile do not hold it. On a file system
    without flock the lock is the file `path` + `.held`, created exclusively, with the holder's process id and host
    name in it; filelock takes over a file left by a dead process of this host, and a file that stays is named in the
    message.

    Args:
        path: The lock file; its folder is made if it is missing. It stays there afterwards.
        timeout: Seconds to wait for another holder; 0 tries once.
        what: What the lock protects: the first words of the message.
        by_creation: Never by flock, which some mounts keep to one host; nothing stays afterwards.

    Raises:
        LockTimeout: another process holds the lock.
        UserError: the lock file cannot be written.
    """
    assert timeout >= 0, "no process waits without limit"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path, timeout=timeout, what=what, by_creation=by_creation)
    try:
        yield
    finally:
        lock.release()


def _acquire(path: Path, *, timeout: float, what: str, by_creation: bool) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path, mode=0o644, fallback_to_soft=False, poll_interval=_POLL_SECONDS)
    try:
        try:
            if not by_creation:
                return lock.acquire(timeout=timeout).lock
        except OSError as error:
            # filelock itself falls back for ENOSYS alone, and waits two seconds for the file that it just made.
            if isinstance(error, Timeout) or error.errno not in _NO_FLOCK:
                raise
        lock = SoftFileLock(f"{path}.held", mode=0o644, poll_interval=_POLL_SECONDS)
        return lock.acquire(timeout=timeout).lock
    except Timeout:
        waited = f"waited {timeout:g} s" if timeout else "did not wait"
        raise LockTimeout(
            f"{what}: another process holds the lock {lock.lock_file} ({waited}); wait for it to end, or end it: "
            f"{_advice(lock)}"
        ) from None


def _advice(lock: BaseFileLock) -> str:
    """How a user finds the holder. Nobody can tell from here whether a process of another host is alive."""
    if not isinstance(lock, SoftFileLock):
        return f"`fuser {lock.lock_file}` on its node shows the process"
    with contextlib.suppress(OSError, ValueError, IndexError):
        process, host = Path(lock.lock_file).read_text().splitlines()[:2]
        where = "this host" if host == socket.gethostname() else f"host {host}"
        return f"process {int(process)} on {where}; if no such process runs there, delete the file"
    return "if no process of this kind runs anywhere, delete the file"
