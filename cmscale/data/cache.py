"""Owns the shards on this node: fetched, checked against the manifest, bounded, shared by processes."""

import contextlib
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.fetch import file_sha256
from cmscale.io.storage import ArrivedChanged, LocalStorage, Storage
from cmscale.runs.manifests import FileEntry

ATTEMPTS = 4
LOCK_MINUTES = 15.0
_TOUCH_SECONDS = 60.0
_UNKNOWN, _VERIFIED, _MISSING, _DAMAGED = range(4)
_BAD = {_MISSING: "missing", _DAMAGED: "damaged"}


class BadFile(RuntimeError):
    """A stored file that is missing or not what the manifest says, fetched again and still; one line with both."""


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def default_cache_dir() -> Path:
    """A folder of this user's in TMPDIR, which clusters point at a node's own disk."""
    return Path(tempfile.gettempdir()) / f"cmscale-cache-{os.getuid()}"


def matches(path: Path, entry: FileEntry) -> bool:
    """Whether a file is there with the size and the hash of its entry."""
    try:
        return path.stat().st_size == entry.size and file_sha256(path) == entry.sha256
    except FileNotFoundError:
        return False


class FileCache:
    """Local copies of a data set's files.

    `path` gives a file that this start of the program has verified: one that lies in the cache from an
    earlier start is hashed once before its first use (which files are, is shared with forked workers). A bad
    one is deleted and fetched again. Processes of a node share the folder through file locks, which end with
    their holder, and renames.

    A data set in a local folder is read in place, unless a cache folder is named.

    Args:
        storage: The data set.
        entries: Its files by name.
        folder: The root of the cache; None reads local data in place and caches S3 in `default_cache_dir()`.
        name: The data set's folder within the cache: its fingerprint, so that data sets never mix.
        limit: Bytes that all data sets in the cache may take together; the least recently used files go.
        wait: Sleeps between attempts; None: really.
    """

    def __init__(
        self,
        storage: Storage,
        entries: Mapping[str, FileEntry],
        *,
        folder: Path | None,
        name: str,
        limit: int,
        wait: Callable[[float], None] | None = None,
    ) -> None:
        self.storage = storage
        self.entries = entries
        self.limit = limit
        self.wait = wait or _wait
        self.in_place = isinstance(storage, LocalStorage) and folder is None
        self.root = folder if folder is not None else default_cache_dir()
        self.folder = storage.root if isinstance(storage, LocalStorage) and folder is None else self.root / name[:16]
        self._number = {name: number for number, name in enumerate(entries)}
        self._state = mmap.mmap(-1, max(1, len(entries)))  # anonymous and shared: forked workers see each other's
        self._touched: dict[str, float] = {}
        largest = max((entry.size for entry in entries.values()), default=0)
        if not self.in_place and largest > limit:
            raise UserError(
                f"data.cache_gb: {limit / 1e9:g} GB is less than one shard ({largest / 1e9:.3g} GB); raise it"
            )

    def path(self, name: str) -> Path:
        """The verified local file; fetches it when it isn't there.

        Raises:
                BadFile: the stored file is missing or damaged, after fetching it again; names it and its hash.
            ConnectionError: the storage does not answer, after several attempts.
        """
        path = self.folder / name
        if self._state[self._number[name]] != _VERIFIED or not path.exists():
            self._obtain(name, path)
        self.touch(name)
        return path

    def has(self, name: str) -> bool:
        """Whether `path` would return, or raise, at once."""
        state = self._state[self._number[name]]
        return state in _BAD or (state == _VERIFIED and (self.folder / name).exists())

    def touch(self, name: str) -> bool:
        """Marks a file as used, now and then: the modification time orders the eviction. False where it was found
        evicted."""
        now = time.monotonic()
        if not self.in_place and now - self._touched.get(name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[name] = now
            try:
                os.utime(self.folder / name)
            except FileNotFoundError:
                return False
        return True

    def _obtain(self, name: str, path: Path) -> None:
        """Verifies or fetches a file, and remembers the outcome: a bad one is not fetched for each of its samples."""
        number, entry = self._number[name], self.entries[name]
        with contextlib.nullcontext() if self.in_place else _locked(path.with_name(f".{path.name}.lock")):
            if self._state[number] not in _BAD:
                self._state[number] = self._check(path, entry) if self.in_place else self._bring(name, path, entry)
        if self._state[number] in _BAD:
            raise BadFile(
                f"{self.storage.join(name)}: {_BAD[self._state[number]]}; expected {entry.size} bytes with SHA-256 "
                f"{entry.sha256}; data_prep/verify.py --repair can write it again"
            )

    def _check(self, path: Path, entry: FileEntry) -> int:
        if matches(path, entry) or matches(path, entry):  # a network file system may err once
            return _VERIFIED
        return _DAMAGED if path.exists() else _MISSING

    def _bring(self, name: str, path: Path, entry: FileEntry) -> int:
        if matches(path, entry):
            return _VERIFIED
        path.unlink(missing_ok=True)
        for part in path.parent.glob(f".{path.name}.part*"):  # of a process that was killed: we hold the lock
            part.unlink(missing_ok=True)
        self._make_room(entry.size)
        return self._fetch(name, path, entry)

    def _fetch(self, name: str, path: Path, entry: FileEntry) -> int:
        part = path.with_name(f".{path.name}.part")
        outcome: int | ConnectionError = _MISSING
        for attempt in range(ATTEMPTS):
            if attempt:
                self.wait(2.0 ** (attempt - 1))
            try:
                self.storage.download(name, part)
            except FileNotFoundError:
                outcome = _MISSING
            except ArrivedChanged:
                outcome = _DAMAGED
            except ConnectionError as error:
                outcome = error
            else:
                if matches(part, entry):
                    part.replace(path)
                    return _VERIFIED
                part.unlink(missing_ok=True)
                outcome = _DAMAGED
        if isinstance(outcome, ConnectionError):
            raise outcome
        return outcome

    def _make_room(self, needed: int) -> None:
        """Deletes the least recently used files until `needed` more bytes fit."""
        with _locked(self.root / ".lock"):
            files = []
            for path in self.root.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):  # a peer deletes too
                    status = path.stat()
                    if not path.name.startswith(".") or ".part" in path.name:
                        files.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total + needed <= self.limit:
                    break
                if not path.name.startswith("."):
                    path.unlink(missing_ok=True)
                    total -= size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock, which ends with its holder. Gives up after a while: no rank waits for ever."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: can't write to {path.parent} ({error.strerror}); name another folder"
        ) from error
    try:
        deadline = time.monotonic() + 60 * LOCK_MINUTES
        pause = 0.001
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{path}: another process has held this lock for {LOCK_MINUTES:g} minutes"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork may have copied the descriptor: closing does not unlock
    finally:
        os.close(descriptor)
