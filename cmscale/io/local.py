"""Stores objects as files in a folder of a local or mounted file system."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io import traffic
from cmscale.io.durable import explained, replace_durably, sync_folder
from cmscale.io.locks import hold
from cmscale.io.protocol import Entry
from cmscale.io.reading import read_regular

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)
"""What file systems without hard links answer: exFAT, SMB, many in user space."""
_RENAME_SECONDS = 60.0  # for another process that writes the same file


class LocalStorage:
    """A folder of a local or mounted file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    @classmethod
    def from_url(cls, url: str) -> "LocalStorage":
        """Opens a path, or `file://` and a path."""
        return cls(Path(url.removeprefix("file://")))

    def join(self, key: str) -> str:
        return str(self.root / key)

    def read(self, key: str) -> bytes:
        return read_regular(self.root / key)

    def read_if_present(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            what = "a pipe or device" if self.root.exists() and not self.root.is_file() else "a file"  # or below one
            raise UserError(f"{self.root}: is {what}, not a folder") from None
        except PermissionError as error:
            raise UserError(
                f"{self.root / key}: can't be read ({error.strerror}); its owner can allow it with chmod"
            ) from None

    def write(self, key: str, data: bytes) -> None:
        replace_durably(self.root / key, data)

    def write_if_absent(self, key: str, data: bytes) -> bool:
        path = self.root / key
        staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        replace_durably(staged, data)
        try:
            os.link(staged, path)  # unlike a rename, fails atomically if the file exists
        except FileExistsError:
            return path.read_bytes() == data
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with hold(path.with_name(f".{path.name}"), timeout=_RENAME_SECONDS, what=str(path), by_creation=True):
                if path.exists():
                    return path.read_bytes() == data
                staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
        sync_folder(path.parent)
        return True

    def upload(self, key: str, path: Path) -> None:
        self._copy(path, self.root / key)

    def download(self, key: str, path: Path) -> None:
        self._copy(self.root / key, path)

    def _copy(self, source: Path, target: Path) -> None:
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # process ids of nodes are alike
            try:
                shutil.copyfile(source, staged)
                traffic.moved(staged.stat().st_size)
                with staged.open("rb") as file:
                    os.fsync(file.fileno())
                staged.replace(target)
            finally:
                staged.unlink(missing_ok=True)
            sync_folder(target.parent)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self.root / prefix.rpartition("/")[0]
        if not folder.is_dir():
            return
        found = []
        for path in _files(folder):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):  # another process has removed it meanwhile
                    status = path.stat()
                    found.append(Entry(key, status.st_size, str(status.st_mtime_ns)))
        yield from sorted(found, key=lambda entry: entry.key)

    def folders(self, prefix: str = "") -> "list[str]":
        if not self.root.is_dir():
            return []
        found = (path for path in self.root.iterdir() if path.name.startswith(prefix) and path.is_dir())
        return sorted(path.name for path in found if next(_files(path), None) is not None)

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def delete_all(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    def sub(self, prefix: str) -> "LocalStorage":
        return LocalStorage(self.root / prefix)

    def local_path(self, key: str) -> Path:
        return self.root / key

    def check_writable(self, key: str) -> None:
        path = self.root / key
        with explained(path):
            folder = path.parent
            while not folder.exists():
                if folder.is_symlink():
                    raise UserError(f"{path}: {folder} is a link to nothing; make its target, or name another place")
                folder = folder.parent
            try:  # permissions alone do not show a file system that is read-only
                tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.").close()
            except FileNotFoundError as error:  # so says /proc
                raise UserError(f"{path}: can't be written ({error.strerror}); name another place") from None

    def abort_uploads(self, is_mine: Callable[[str], bool]) -> int:  # noqa: ARG002
        return 0


def _files(folder: Path) -> Iterator[Path]:
    """What counts as an object: any file but the hidden ones, which are being written."""
    for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _raise_unless_gone(error: OSError) -> None:
    """A folder that another process has removed meanwhile, or that may not be read, has no objects."""
    if not isinstance(error, FileNotFoundError | PermissionError):
        raise error
