"""Owns files that a run needs from elsewhere (weights): fetched once a node, checked against a hash, cached.

A URL may end in `#sha256=HEX`; then whatever it names must have that hash.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.storage import open_parent, replace_durably


def cache_folder() -> Path:
    """CMSCALE_CACHE, else `cmscale` in XDG_CACHE_HOME, else ~/.cache/cmscale."""
    if explicit := os.environ.get("CMSCALE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cmscale"


def local_file(url: str) -> Path:
    """A local path of the file at `url`: the path itself, or a cached copy of an `s3://` object.

    Several processes of a node may ask at once; one fetches. A cached copy is used as long as the object is the
    same one (its ETag), and the copy's hash is what it was when it came.

    Raises:
        UserError: no such file, or not the hash that the URL names.
    """
    plain, _, fragment = url.partition("#")
    expected = fragment.removeprefix("sha256=") if fragment else None
    if not plain.startswith("s3://"):
        path = Path(plain.removeprefix("file://"))
        if not path.is_file():
            raise UserError(f"{plain}: no such file")
        _check(path, expected, url=plain)
        return path
    storage, key = open_parent(plain)
    entry = next((entry for entry in storage.list(key) if entry.key == key), None)
    if entry is None:
        raise UserError(f"{plain}: no such object")
    name = hashlib.sha256(f"{plain} {entry.size} {entry.version}".encode()).hexdigest()[:16]
    target = cache_folder() / "files" / f"{name}-{key}"
    recorded = target.with_name(f"{target.name}.sha256")
    with locked(target.with_name(f"{target.name}.lock")):
        if not (target.is_file() and recorded.is_file() and recorded.read_text() == file_sha256(target)):
            storage.download(key, target)
            replace_durably(recorded, file_sha256(target).encode())
        try:
            _check(target, expected, url=plain)
        except UserError:
            target.unlink(missing_ok=True)
            raise
    return target


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path` against the other processes of this node."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str | None, *, url: str) -> None:
    if expected is None:
        return
    actual = file_sha256(path)
    if actual != expected:
        raise UserError(f"{url}: has SHA-256 {actual}, not {expected} as asked for; the file is not the one you mean")
