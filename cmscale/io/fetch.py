"""Fetches files that a run needs from elsewhere (weights): once per node, checked against a hash, cached.

A URL may end in `#sha256=HEX`; then whatever it names must have that hash.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import NoSpace, UserError
from cmscale.io import traffic
from cmscale.io.durable import no_space_for, replace_durably
from cmscale.io.locks import LockTimeout, hold
from cmscale.io.patience import patience_seconds
from cmscale.io.place import Place, split_hash
from cmscale.io.protocol import Entry
from cmscale.io.reading import why_no_file
from cmscale.io.storage import Storage, open_parent, stored_entry

DOWNLOAD_MINUTES = 30.0
UNUSED_DAYS = 30
"""After so many days without use a copy of an object, or what an evaluation has begun, is removed."""
_HASHED_AT_ONCE = 1 << 20
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


def cache_folder() -> Path:
    """CMSCALE_CACHE, else `cmscale` in XDG_CACHE_HOME, else ~/.cache/cmscale."""
    if explicit := os.environ.get("CMSCALE_CACHE"):
        return Place(explicit).local("CMSCALE_CACHE")
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cmscale"


def local_file(url: str) -> Path:
    """The path of a local file, or of the cached copy of an object of a storage.

    Where several processes of a node ask at once, one downloads. A cached copy is used while the object keeps its
    ETag and the copy keeps the hash it had after the download, and is removed some time after its last use.

    Raises:
        UserError: there is no such file, or its hash is not the one in the URL.
    """
    plain, expected = split_hash(url)
    if expected is not None and not _DIGEST.fullmatch(expected):
        raise UserError(f"{plain}: the URL asks for the SHA-256 {expected!r}; write its 64 hexadecimal digits")
    storage, key = open_parent(plain)
    path = storage.local_path(key)
    if path is not None:
        if not path.is_file():
            raise UserError(f"{plain}: {why_no_file(path)}")
        if expected is not None:
            _check(file_sha256(path, shown=True), expected, url=plain)
        return path
    entry = stored_entry(storage, key)
    if entry is None:
        raise UserError(f"{plain}: no such object")
    name = hashlib.sha256(f"{plain} {entry.size} {entry.version}".encode()).hexdigest()[:16]
    target = cache_folder() / "files" / f"{name}-{key}"
    recorded = target.with_name(f"{target.name}.sha256")
    with download_lock(f"files/{target.name}.lock", into=target.parent, setting="CMSCALE_CACHE"):
        actual = file_sha256(target, shown=True) if target.is_file() and recorded.is_file() else None
        if actual is None or recorded.read_text() != actual:
            _remove_unused(target.parent)
            actual = _download(storage, entry, target)
            if expected is not None and actual != expected.lower():  # perhaps changed on the way
                actual = _download(storage, entry, target)
            replace_durably(recorded, actual.encode())
        try:
            _check(actual, expected, url=plain)
        except UserError:
            target.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # in somebody else's cache, or on a mount that keeps no times
            os.utime(recorded)  # by which it is known as used
    return target


def is_unused(path: Path) -> bool:
    """Whether a file, or a folder with all that it holds, was not used for `UNUSED_DAYS`.

    Other users' files never are: in a folder that a group shares, nobody but the owner can mark one as used.

    Raises:
        OSError: a file is gone meanwhile.
    """
    newest = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    return path.stat().st_uid == os.getuid() and time.time() - newest > 86_400 * UNUSED_DAYS


def _remove_unused(folder: Path) -> None:
    """Removes cached copies that are not used: older versions of an object are never asked for."""
    for recorded in folder.glob("*.sha256"):
        with contextlib.suppress(OSError):  # others may remove it, too; what is open in another process stays readable
            if is_unused(recorded):
                recorded.with_suffix("").unlink(missing_ok=True)
                recorded.unlink()


def _download(storage: Storage, entry: Entry, target: Path) -> str:
    """Downloads an object, and shows how far that is. Returns the hash of what arrived."""
    with traffic.showing(f"downloading {storage.join(entry.key)}", entry.size):
        storage.download(entry.key, target)
    return file_sha256(target)


@contextmanager
def download_lock(name: str, *, into: Path, setting: str) -> Iterator[None]:
    """Holds the lock file `name` in the cache folder, so that one process per node downloads and the others wait.

    Args:
        into: The folder that the block writes.
        setting: The variable that chooses it.

    Raises:
        NoSpace: a folder has no space left; of a full disk the message names the node.
        RuntimeError: another process has held it for half an hour. The user has made no mistake: a restart may help.
    """
    path = cache_folder() / name
    what = f"{path.parent}: downloading a file for this node"
    with contextlib.ExitStack() as stack:
        try:
            timeout = 60 * DOWNLOAD_MINUTES + patience_seconds()  # the holder may wait for storage
            stack.enter_context(hold(path, timeout=timeout, what=what))
        except LockTimeout as error:
            raise RuntimeError(str(error)) from None
        except NoSpace as error:
            raise _full(cache_folder(), "CMSCALE_CACHE", error) from error
        try:
            yield
        except NoSpace as error:
            raise _full(into, setting, error) from error


def _full(folder: Path, setting: str, error: NoSpace) -> NoSpace:
    return no_space_for(str(folder), error, advice=f"let {setting} name a folder on a larger disk")


def file_sha256(path: Path, *, shown: bool = False) -> str:
    """SHA-256 of a local file, in hexadecimal.

    Args:
        shown: Whether its bytes count for what `traffic` shows.
    """
    digest, told = hashlib.sha256(), traffic.current() if shown else None
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_HASHED_AT_ONCE))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if told is not None:
                told.moved(count)
    return digest.hexdigest()


def _check(actual: str, expected: str | None, *, url: str) -> None:
    if expected is not None and actual != expected.lower():
        raise UserError(f"{url}: has SHA-256 {actual}, not {expected} as the URL requires; it is another file")
