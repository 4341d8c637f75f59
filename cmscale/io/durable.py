"""Writes local files and names so that a crash at any moment leaves the old state or the new one."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import NoSpace, UserError
from cmscale.io.process import node_name

NO_SPACE = "no space left"
"""In every message about a full disk or quota, the system's own among them (there with a capital)."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns errors of the file system that a user can mend into UserErrors (NoSpace among them) that name `path`."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                raise NoSpace(f"{path}: {NO_SPACE} on the device; free some or write elsewhere") from error
            case errno.EACCES | errno.EPERM | errno.EROFS:
                raise UserError(f"{path}: not allowed to write there ({error.strerror})") from error
            case errno.ENOTDIR | errno.EEXIST:
                raise UserError(f"{path}: a file is where a folder is needed") from error
            case errno.EISDIR:
                raise UserError(f"{path}: a folder is there; name a file") from error
            case errno.ENAMETOOLONG | errno.ELOOP | errno.ENXIO:
                raise UserError(f"{path}: can't be written ({error.strerror}); name another place") from error
        raise


def no_space_for(what: str, error: OSError | NoSpace, *, advice: str) -> NoSpace:
    """The error for a folder without space that may be this node's own, as that of a cache.

    A full disk names the node, as another node may have room. A quota is used up on all of them.
    """
    cause = error.__cause__ if isinstance(error, NoSpace) else error
    is_quota = isinstance(cause, OSError) and cause.errno == errno.EDQUOT
    where = f"{what}: {NO_SPACE} in the quota" if is_quota else f"{what} on {node_name()}: {NO_SPACE} on the device"
    return NoSpace(f"{where}; free some, or {advice}")


def gone(folder: Path) -> UserError:
    """The error for a folder in which something should be written, and which is not made anew for that."""
    return UserError(f"{folder}: gone from {node_name()} (moved, removed or not mounted); it is not made anew")


def replace_durably(path: Path, data: bytes, *, within: Path | None = None) -> None:
    """Writes a file so that, after a crash at any moment, it holds the old bytes or the new ones.

    Missing folders are made.

    Args:
        within: A folder that must be there, such as a run's, which may have been moved away.

    Raises:
        NoSpace: no space is left.
        UserError: the folder may not be written, or the one that must be there is gone.
    """
    with explained(path):
        if within is not None and not within.is_dir():
            raise gone(within)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def follow_umask(path: Path) -> None:
    """Gives a file the mode that `open` gives new files: some libraries make theirs readable for their owner alone."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with probe.open("xb") as file:  # the umask itself can't be read without being changed, in all threads
            mode = os.fstat(file.fileno()).st_mode
    finally:
        probe.unlink(missing_ok=True)
    if path.stat().st_mode != mode:
        with contextlib.suppress(PermissionError, NotImplementedError):  # some mounts have one mode for all files
            path.chmod(mode & 0o777)


def sync_file(path: Path) -> None:
    """Makes what was written to a file durable, and its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, if its file system can do that (some FUSE file systems cannot)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
