"""The shard cache: fetched once, checked, bounded, retried, never waited for without end."""

import collections
import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from data_fixtures import COUNT, collect, data, world

from cmscale.data import cache, open_batches
from cmscale.data.cache import FileCache
from cmscale.errors import UserError
from cmscale.runs.manifests import FileEntry


class Counting:
    """A storage that counts downloads and fails as told."""

    url = "s3://counting"

    def __init__(self, files: dict[str, bytes], faults: list[object] | None = None) -> None:
        self.files = files
        self.faults = faults or []
        self.downloads: list[str] = []

    def join(self, key: str) -> str:
        return f"{self.url}/{key}"

    def download(self, key: str, path: Path) -> None:
        self.downloads.append(key)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        path.write_bytes(fault if isinstance(fault, bytes) else self.files[key])


def cache_of(storage: Counting, folder: Path, *, limit: int = 10_000, waits: list[float] | None = None) -> FileCache:
    entries = {
        name: FileEntry(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in storage.files.items()
    }
    log = waits if waits is not None else []
    return FileCache(storage, entries, folder=folder, name="set", limit=limit, wait=log.append)  # type: ignore[arg-type]


FILES = {f"shard-{n}": bytes([n]) * 1000 for n in range(8)}


def test_a_file_is_fetched_once_and_hashed_once_a_start(tmp_path: Path, monkeypatch) -> None:
    hashed = []
    original = cache.file_sha256
    monkeypatch.setattr(cache, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    storage = Counting(FILES)
    first = cache_of(storage, tmp_path)
    assert [first.path("shard-1").read_bytes() for _ in range(3)] == [FILES["shard-1"]] * 3
    assert (storage.downloads, len(hashed)) == (["shard-1"], 1)
    again = cache_of(storage, tmp_path)
    assert [again.path("shard-1") for _ in range(3)]
    assert (storage.downloads, len(hashed)) == (["shard-1"], 2)


def test_faults_of_the_network_are_retried_with_growing_waits(tmp_path: Path) -> None:
    waits: list[float] = []
    storage = Counting(FILES, [ConnectionError("503"), b"truncated", FileNotFoundError("not yet")])
    assert cache_of(storage, tmp_path, waits=waits).path("shard-3").read_bytes() == FILES["shard-3"]
    assert waits == [1.0, 2.0, 4.0]


def test_a_storage_that_never_answers_is_one_fault(tmp_path: Path) -> None:
    storage = Counting(FILES, [ConnectionError(f"try {n}") for n in range(9)])
    with pytest.raises(ConnectionError, match="try 3"):
        cache_of(storage, tmp_path).path("shard-3")
    assert not list(tmp_path.rglob("shard*"))


def test_the_cache_stays_within_its_limit_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    storage = Counting(FILES)
    small = cache_of(storage, tmp_path, limit=3000)
    for at, number in enumerate([0, 1, 2, 3, 4]):
        path = small.path(f"shard-{number}")
        os.utime(path, (at, at))
        assert sum(p.stat().st_size for p in tmp_path.glob("*/shard*")) <= 3000
    assert sorted(p.name for p in tmp_path.glob("*/shard*")) == ["shard-2", "shard-3", "shard-4"]
    assert small.path("shard-0").read_bytes() == FILES["shard-0"]


def test_a_cache_smaller_than_a_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.cache_gb"):
        cache_of(Counting(FILES), tmp_path, limit=999)


def test_leftovers_of_a_killed_download_are_removed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    leftover = tmp_path / "set" / ".shard-2.part.1234abcd"
    leftover.write_bytes(b"half")
    cache_of(Counting(FILES), tmp_path).path("shard-2")
    assert not leftover.exists()


def test_two_caches_of_one_node_fetch_a_file_once(tmp_path: Path) -> None:
    storage = Counting(FILES)
    caches = [cache_of(storage, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda one: one.path("shard-5"), caches))
    assert len(set(paths)) == 1
    assert storage.downloads == ["shard-5"]


def test_a_lock_held_for_too_long_is_a_fault_not_a_wait_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "LOCK_MINUTES", 0.0)
    monkeypatch.setattr("time.sleep", lambda _: None)
    lock = tmp_path / ".lock"
    with cache._locked(lock), pytest.raises((RuntimeError, UserError), match="another process"), cache._locked(lock):
        pass


def test_a_lock_ends_with_its_holder_and_what_a_killed_reader_left_is_cleared(sets: dict[str, str], tmp_path: Path):
    """SIGKILL in the middle of a download, with workers: no lock, no shared memory, no process, no half file stays."""
    code = (
        "import sys\n"
        "from cmscale.config import Data\n"
        "from cmscale.data import open_batches\n"
        "from cmscale.io.storage import LocalStorage\n"
        "from cmscale.distributed.world import World\n"
        "download = LocalStorage.download\n"
        "def stuck(self, key, path):\n"
        "    if '00003' not in key:\n"
        "        return download(self, key, path)\n"
        "    path.write_bytes(self.read(key)[:1000])\n"
        "    print('stuck', flush=True)\n"
        "    sys.stdin.read()\n"
        "config = Data(path=sys.argv[1], cache_dir=sys.argv[2], workers=1, num_canonical_nodes=3, shuffle_block=6)\n"
        "batches = open_batches(config, World(), seed=4, global_batch_size=2, image_size=16)\n"
        "LocalStorage.download = stuck\n"
        "print(*(w.pid for w in batches._iterator._workers), flush=True)\n"
        "while True: next(batches)\n"
    )
    command = [sys.executable, "-c", code, sets["mds"], str(tmp_path)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    worker = int(reader.stdout.readline())
    assert reader.stdout.readline() == "stuck\n"
    (left,) = tmp_path.glob("*/.shard.00003*.part*")
    reader.kill()
    reader.wait()

    config = data(sets["mds"], cache_dir=str(tmp_path))
    assert collect(config, num_ranks=1, batch=COUNT, start=0, steps=1) == collect(
        data(sets["mds"]), num_ranks=1, batch=COUNT, start=0, steps=1
    )
    assert not left.exists()
    until = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "the worker outlives its rank"
        time.sleep(0.05)
    owners = (f"torch_{pid}_" for pid in (reader.pid, worker))
    assert not [path for owner in owners for path in Path("/dev/shm").glob(f"{owner}*")]


def test_a_killed_worker_is_a_fault_not_a_wait_for_ever(sets: dict[str, str]) -> None:
    batches = open_batches(data(sets["mds"], workers=1), world(), seed=0, global_batch_size=4, image_size=16)

    def kill_and_go_on() -> None:
        os.kill(batches._iterator._workers[0].pid, signal.SIGKILL)
        collections.deque(batches, maxlen=0)

    with closing(batches):
        next(batches)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            kill_and_go_on()
