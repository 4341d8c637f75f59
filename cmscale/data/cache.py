"""Caches a data set's files on this node: fetched, verified, limited in size, shared by processes."""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import DamagedInput, UserError
from cmscale.io.durable import explained
from cmscale.io.fetch import file_sha256
from cmscale.io.locks import LockTimeout, hold
from cmscale.io.protocol import ArrivedChanged, Storage
from cmscale.runs.manifests import FileEntry

ATTEMPTS = 4
LOCK_MINUTES = 15.0
_TOUCH_SECONDS = 60.0
_UNKNOWN, _VERIFIED, _MISSING, _DAMAGED = range(4)
_BAD = {_MISSING: "missing", _DAMAGED: "damaged"}


class BadFile(DamagedInput):
    """Raised for a stored file that is missing or differs from the manifest, even after fetching it again."""


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def default_cache_dir() -> Path:
    """This user's folder in TMPDIR, which clusters set to a disk of the node."""
    return Path(tempfile.gettempdir()) / f"cmscale-cache-{os.getuid()}"


def matches(path: Path, entry: FileEntry) -> bool:
    """Whether a file exists and has the size and hash of its entry."""
    try:
        return path.stat().st_size == entry.size and file_sha256(path) == entry.sha256
    except FileNotFoundError:
        return False


class FileCache:
    """Local copies of a data set's files.

    `path` returns a file that was verified since the program started: a file from an earlier start is hashed once
    before its first use (forked workers share the record of this), and deleted and fetched again if it is bad.
    Processes of a node share the folder by means of file locks, which end with their holder, and renames.

    A data set in a local folder is read in place, unless a cache folder is given.

    Args:
        storage: The data set.
        entries: Its files by name.
        folder: The root of the cache; None reads local data in place and caches S3 in `default_cache_dir()`.
        name: The data set's folder in the cache: its fingerprint, so that data sets never mix.
        limit: Bytes that all data sets in the cache may use together; the least recently used files are deleted.
        wait: Sleeps between attempts; for tests.
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
        self.root = folder if folder is not None else default_cache_dir()
        original = storage.local_path("") if folder is None else None
        self.in_place = original is not None
        self.folder = original if original is not None else self.root / name[:16]
        self._number = {name: number for number, name in enumerate(entries)}
        self._state = mmap.mmap(-1, max(1, len(entries)))  # anonymous shared memory: forked workers see the same
        self._touched: dict[str, float] = {}
        largest = max((entry.size for entry in entries.values()), default=0)
        if not self.in_place and largest > limit:
            raise UserError(
                f"data.cache_gb: {limit / 1e9:g} GB is less than one shard ({largest / 1e9:.3g} GB); raise it"
            )

    def path(self, name: str) -> Path:
        """The verified local file, fetched if it is not there.

        Raises:
            BadFile: the stored file is missing or damaged, even after fetching it again; names it and its hash.
            ConnectionError: the storage does not answer, after several attempts.
        """
        path = self.folder / name
        if self._state[self._number[name]] != _VERIFIED or not path.exists():
            self._obtain(name, path)
        self.touch(name)
        return path

    def has(self, name: str) -> bool:
        """Whether `path` would return or raise without fetching."""
        state = self._state[self._number[name]]
        return state in _BAD or (state == _VERIFIED and (self.folder / name).exists())

    def touch(self, name: str) -> bool:
        """Marks a file as used, at most once a minute: modification times order the eviction.

        Returns:
            False if the file turned out to be evicted.
        """
        now = time.monotonic()
        if not self.in_place and now - self._touched.get(name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[name] = now
            try:
                os.utime(self.folder / name)
            except FileNotFoundError:
                return False
        return True

    def _obtain(self, name: str, path: Path) -> None:
        """Verifies or fetches a file and records the result, so that a bad file is not fetched for each sample."""
        number, entry = self._number[name], self.entries[name]
        with contextlib.nullcontext() if self.in_place else _locked(path.with_name(f".{path.name}.lock")):
            if self._state[number] not in _BAD:
                self._state[number] = self._check(path, entry) if self.in_place else self._bring(name, path, entry)
        if self._state[number] in _BAD:
            raise BadFile(
                f"{self.storage.join(name)}: {_BAD[self._state[number]]}; expected {entry.size} bytes with SHA-256 "
                f"{entry.sha256}; data_prep/verify.py --repair can make it again"
            )

    def _check(self, path: Path, entry: FileEntry) -> int:
        if matches(path, entry) or matches(path, entry):  # network file systems can fail once
            return _VERIFIED
        return _DAMAGED if path.exists() else _MISSING

    def _bring(self, name: str, path: Path, entry: FileEntry) -> int:
        if matches(path, entry):
            return _VERIFIED
        path.unlink(missing_ok=True)
        for dots in (".", ".."):  # what a killed process left, a storage's own temporary files too: we hold the lock
            for leftover in path.parent.glob(f"{dots}{path.name}.part*"):
                leftover.unlink(missing_ok=True)
        part = path.with_name(f".{path.name}.part")
        self._make_room(part, entry.size)
        try:
            return self._fetch(name, path, entry, part)
        finally:
            part.unlink(missing_ok=True)

    def _fetch(self, name: str, path: Path, entry: FileEntry, part: Path) -> int:
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
                outcome = _DAMAGED
        if isinstance(outcome, ConnectionError):
            raise outcome
        return outcome

    def _make_room(self, part: Path, size: int) -> None:
        """Deletes the least recently used files until `size` more bytes fit, and reserves them for `part`.

        The reservation is an empty file of this length, which other processes count until the download is complete.
        """
        with _locked(self.root / ".lock"):
            used, complete = self._inventory()
            for _, length, path in sorted(complete):
                if used + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= length
            with explained(part), part.open("wb") as file:
                file.truncate(size)

    def _inventory(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Bytes used and reserved in the cache, and its complete files as (modification time, bytes, path)."""
        complete: list[tuple[int, int, Path]] = []
        reserved: dict[tuple[Path, str], int] = {}
        for path in self.root.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process deletes too
                status = path.stat()
                if not path.name.startswith("."):
                    complete.append((status.st_mtime_ns, status.st_size, path))
                elif ".part" in path.name:  # a download may use several temporary files: the longest counts
                    target = path.parent, path.name.lstrip(".").partition(".part")[0]
                    reserved[target] = max(reserved.get(target, 0), status.st_size)
        return sum(length for _, length, _ in complete) + sum(reserved.values()), complete


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file. Gives up after a while, so that no rank waits without end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write to {path.parent} ({error.strerror}); name another folder"
        ) from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(path, timeout=60 * LOCK_MINUTES, what="data.cache_dir"))
        except LockTimeout as error:
            raise RuntimeError(str(error)) from None  # a fault of the node, not the user's mistake
        yield
