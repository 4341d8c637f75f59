"""Caches a data set's files on this node: fetched, verified, limited in size, shared by processes."""

import contextlib
import hashlib
import io
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cmscale.data.cache_lock import lock_of, locked, make_own
from cmscale.data.cache_room import Room
from cmscale.errors import DamagedInput, UserError
from cmscale.io.protocol import ArrivedChanged, Storage, StorageAway
from cmscale.runs.manifests import FileEntry

ATTEMPTS = 4
_TOUCH_SECONDS = 60.0
_MAX_EVICTIONS = 10
_IDENTITY = struct.Struct("<Q")
_UNKNOWN, _VERIFIED, _MISSING, _DAMAGED = range(4)
_BAD = {_MISSING: "missing", _DAMAGED: "damaged"}


class BadFile(DamagedInput):
    """Raised for a stored file that is missing or differs from the manifest, even after fetching it again."""


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def default_cache_dir() -> Path:
    """This user's folder in TMPDIR, which clusters set to a disk of the node."""
    return Path(tempfile.gettempdir()) / f"cmscale-cache-{os.getuid()}"


def identity_if_good(path: Path, entry: FileEntry) -> int | None:
    """The identity of a file that has the size and hash of its entry; None if it has not, or does not exist."""
    try:
        with path.open("rb", buffering=0) as file:
            return identity(file) if is_good(file, entry) else None
    except FileNotFoundError:
        return None


def is_good(file: io.FileIO, entry: FileEntry) -> bool:
    """Whether an open file has the size and hash of its entry."""
    if os.fstat(file.fileno()).st_size != entry.size:
        return False
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


def identity(file: io.FileIO) -> int:
    """A number that no file has which another user, or another download, put in the place of this one."""
    status = os.fstat(file.fileno())
    facts = struct.pack("<4Q", status.st_dev, status.st_ino, status.st_uid, status.st_size)
    return int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little")


class FileCache:
    """Local copies of a data set's files.

    `open` returns a file that was verified since the program started: a file from an earlier start is hashed once
    before its first use (forked workers share the record of this), and deleted and fetched again if it is bad. A file
    that has taken the place of the verified one is hashed again, by the descriptor that is returned.
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
        if folder is None and original is None:
            make_own(self.root)
        self.in_place = original is not None
        self.folder = original if original is not None else self.root / name[:16]
        self._number = {name: number for number, name in enumerate(entries)}
        self._state = mmap.mmap(-1, max(1, len(entries)))  # anonymous shared memory: forked workers see the same
        self._identities = mmap.mmap(-1, _IDENTITY.size * max(1, len(entries)))
        self._touched: dict[str, float] = {}
        self._room = Room(self.root, limit, wait=self.wait)
        largest = max((entry.size for entry in entries.values()), default=0)
        if not self.in_place and largest > limit:
            raise UserError(
                f"data.cache_gb: {limit / 1e9:g} GB is less than one shard ({largest / 1e9:.3g} GB); raise it"
            )

    def open(self, name: str) -> io.FileIO:
        """The verified local file, fetched if it is not there, open for reading.

        Raises:
            BadFile: the stored file is missing or damaged, even after fetching it again; names it and its hash.
            StorageAway: the storage does not answer.
        """
        for _ in range(_MAX_EVICTIONS):
            path = self.path(name)
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                continue  # another process evicted it between the check and the opening
            if self._is_verified(name, file):
                return file
            file.close()
        path = self.folder / name
        raise RuntimeError(f"{path}: evicted {_MAX_EVICTIONS} times before it could be opened; raise data.cache_gb")

    def _is_verified(self, name: str, file: io.FileIO) -> bool:
        """Whether an open file is the one that was hashed, or is as good. If it is bad, `path` fetches another one."""
        number = self._number[name]
        if identity(file) == self._identity(number):
            return True
        good = is_good(file, self.entries[name])
        if good:
            self._record(number, _VERIFIED, identity(file))
        else:
            self._state[number] = _UNKNOWN
        return good

    def _identity(self, number: int) -> int:
        return _IDENTITY.unpack_from(self._identities, _IDENTITY.size * number)[0]

    def _record(self, number: int, state: int, found: int | None = None) -> None:
        if found is not None:
            _IDENTITY.pack_into(self._identities, _IDENTITY.size * number, found)
        self._state[number] = state

    def path(self, name: str) -> Path:
        """The path of the verified local file, fetched if it is not there; for what is read, use `open`.

        Raises: as `open`.
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
            except OSError:  # some mounts keep no times, and other users' files are touched by them alone
                return True
        return True

    def _obtain(self, name: str, path: Path) -> None:
        """Verifies or fetches a file and records the result, so that a bad file is not fetched for each sample."""
        number, entry = self._number[name], self.entries[name]
        with contextlib.nullcontext() if self.in_place else locked(lock_of(path), root=self.root):
            if self._state[number] not in _BAD:
                found = self._check(path, entry) if self.in_place else self._bring(name, path, entry)
                self._record(number, *found)
        if self._state[number] in _BAD:
            raise BadFile(
                f"{self.storage.join(name)}: {_BAD[self._state[number]]}; expected {entry.size} bytes with SHA-256 "
                f"{entry.sha256}; data_prep/verify.py --repair can make it again"
            )

    def _check(self, path: Path, entry: FileEntry) -> tuple[int, int | None]:
        """The state of a file of a local data set, and its identity if it is good."""
        found = identity_if_good(path, entry) or identity_if_good(path, entry)  # network file systems can fail once
        if found is not None:
            return _VERIFIED, found
        return (_DAMAGED if path.exists() else _MISSING), None

    def _bring(self, name: str, path: Path, entry: FileEntry) -> tuple[int, int | None]:
        """The state of a cached file after fetching it if necessary, and its identity if it is good."""
        if (found := identity_if_good(path, entry)) is not None:
            return _VERIFIED, found
        path.unlink(missing_ok=True)
        for dots in (".", ".."):  # what a killed process left, a storage's own temporary files too: we hold the lock
            for leftover in path.parent.glob(f"{dots}{path.name}.part*"):
                leftover.unlink(missing_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            return self._room.use(part, entry.size, lambda: self._fetch(name, path, entry, part))
        finally:
            part.unlink(missing_ok=True)

    def _fetch(self, name: str, path: Path, entry: FileEntry, part: Path) -> tuple[int, int | None]:
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
            except StorageAway:
                raise  # the storage has waited already
            except ConnectionError as error:
                outcome = error
            else:
                found = identity_if_good(part, entry)
                if found is not None:
                    part.replace(path)
                    return _VERIFIED, found
                outcome = _DAMAGED
        if isinstance(outcome, ConnectionError):
            raise outcome
        return outcome, None
