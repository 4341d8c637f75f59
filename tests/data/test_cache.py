"""The shard cache: files are fetched once, verified, limited in size and retried, and no wait is without end."""

import collections
import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_fixtures import COUNT, collect, data, world
from outages import use_patience

from cmscale.data import cache, cache_lock, cache_room, open_batches
from cmscale.data.cache import FileCache
from cmscale.data.workers import with_advice
from cmscale.errors import NoSpace, UserError
from cmscale.io.local import LocalStorage
from cmscale.io.locks import LockTimeout, hold
from cmscale.runs.manifests import FileEntry


class Counting:
    """A storage that records downloads, and fails or calls `during` in them."""

    url = "s3://counting"

    def __init__(self, files: dict[str, bytes], faults: list[object] | None = None) -> None:
        self.files = files
        self.faults = faults or []
        self.downloads: list[str] = []
        self.during: Callable[[str], object] = lambda _: None

    def local_path(self, key: str) -> None:
        return None

    def join(self, key: str) -> str:
        return f"{self.url}/{key}"

    def download(self, key: str, path: Path) -> None:
        self.downloads.append(key)
        self.during(key)
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
    original = cache.is_good
    monkeypatch.setattr(cache, "is_good", lambda file, entry: hashed.append(file.name) or original(file, entry))
    storage = Counting(FILES)
    first = cache_of(storage, tmp_path)
    assert [first.open("shard-1").read() for _ in range(3)] == [FILES["shard-1"]] * 3
    assert (storage.downloads, len(hashed)) == (["shard-1"], 1)
    again = cache_of(storage, tmp_path)
    assert [again.open("shard-1").read() for _ in range(3)]
    assert (storage.downloads, len(hashed)) == (["shard-1"], 2)


def test_faults_of_the_network_are_retried_with_growing_waits(tmp_path: Path) -> None:
    waits: list[float] = []
    storage = Counting(FILES, [ConnectionError("503"), b"truncated", FileNotFoundError("not yet")])
    assert cache_of(storage, tmp_path, waits=waits).path("shard-3").read_bytes() == FILES["shard-3"]
    assert waits == [1.0, 2.0, 4.0]


def test_retries_really_wait(tmp_path: Path, monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    storage = Counting(FILES, [ConnectionError("503")])
    entry = FileEntry(name="shard-1", size=1000, sha256=hashlib.sha256(FILES["shard-1"]).hexdigest())
    FileCache(storage, {"shard-1": entry}, folder=tmp_path, name="set", limit=10_000).path("shard-1")  # type: ignore[arg-type]
    assert slept == [1.0]


def test_a_storage_that_never_answers_is_one_fault(tmp_path: Path) -> None:
    storage = Counting(FILES, [ConnectionError(f"try {n}") for n in range(9)])
    with pytest.raises(ConnectionError, match="try 3"):
        cache_of(storage, tmp_path).path("shard-3")
    assert not list(tmp_path.rglob("*shard-3*part*"))
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


def test_a_file_that_is_used_again_is_not_the_next_to_be_deleted(tmp_path: Path) -> None:
    storage = Counting(FILES)
    small = cache_of(storage, tmp_path, limit=2000)
    for number in (0, 1):
        os.utime(small.path(f"shard-{number}"), (number, number))
    cache_of(storage, tmp_path, limit=2000).path("shard-0")
    small.path("shard-2")
    assert sorted(p.name for p in tmp_path.glob("*/shard*")) == ["shard-0", "shard-2"]


def test_use_is_recorded_once_a_minute_and_a_deleted_file_is_noticed_then(tmp_path: Path, monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr(cache.time, "monotonic", lambda: now)
    some = cache_of(Counting(FILES), tmp_path)
    path = some.path("shard-0")
    os.utime(path, (0, 0))
    now += 59
    assert some.touch("shard-0")
    assert path.stat().st_mtime == 0
    now += 1
    assert some.touch("shard-0")
    assert path.stat().st_mtime > 0
    path.unlink()
    assert some.touch("shard-0")
    now += 60
    assert not some.touch("shard-0")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_cache_on_a_mount_that_keeps_no_times_is_read(number: int, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "utime", refuse)
    assert cache_of(Counting(FILES), tmp_path).open("shard-1").read() == FILES["shard-1"]


def test_a_local_data_set_is_read_in_place_untouched_and_checked_twice(tmp_path: Path, monkeypatch) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("shard-0", FILES["shard-0"])
    os.utime(tmp_path / "shard-0", (0, 0))
    entry = FileEntry(name="shard-0", size=1000, sha256=hashlib.sha256(FILES["shard-0"]).hexdigest())
    answers = iter([None, 7])
    monkeypatch.setattr(cache, "identity_if_good", lambda *_: next(answers))  # a network file system that fails once
    found = FileCache(storage, {"shard-0": entry}, folder=None, name="set", limit=1).path("shard-0")
    assert found == tmp_path / "shard-0"
    assert found.stat().st_mtime == 0
    assert [path.name for path in tmp_path.iterdir()] == ["shard-0"]


def test_a_remote_data_set_is_cached_in_a_folder_of_the_user_in_tmpdir(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = Counting(FILES)
    entry = FileEntry(name="shard-0", size=1000, sha256=hashlib.sha256(FILES["shard-0"]).hexdigest())
    some = FileCache(storage, {"shard-0": entry}, folder=None, name="set", limit=1000)  # type: ignore[arg-type]
    assert some.path("shard-0") == tmp_path / f"cmscale-cache-{os.getuid()}" / "set" / "shard-0"


def test_files_that_another_process_deletes_meanwhile_are_not_counted(tmp_path: Path) -> None:
    some = cache_of(Counting(FILES), tmp_path, limit=1000)
    some.path("shard-0")
    (some.folder / "shard-9").symlink_to("nowhere")  # listed, but gone when it is looked at
    assert some.path("shard-1").exists()


def test_whether_a_file_needs_fetching_is_known_for_good_bad_and_deleted_files(tmp_path: Path) -> None:
    storage = Counting(FILES, [b"damaged"] * cache.ATTEMPTS)
    some = cache_of(storage, tmp_path)
    assert not some.has("shard-0")
    with pytest.raises(cache.BadFile, match="shard-0: damaged"):
        some.path("shard-0")
    assert some.has("shard-0")
    path = some.path("shard-1")
    assert some.has("shard-1")
    path.unlink()
    assert not some.has("shard-1")


def test_the_cache_belongs_to_its_user_alone_and_a_file_in_its_place_is_one_line(tmp_path: Path) -> None:
    cache_of(Counting(FILES), tmp_path / "cache").path("shard-0")
    assert (tmp_path / "cache" / "set").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=rf"^data.cache_dir: cannot write to {tmp_path}/file/set [^\n]*$"):
        cache_of(Counting(FILES), tmp_path / "file").path("shard-0")


def test_processes_that_fetch_at_the_same_time_stay_within_the_limit_together(tmp_path: Path) -> None:
    """While one cache downloads, another one of the node does, and a third: each counts what the others will write."""
    storage = Counting(FILES)
    first, second, third = (cache_of(storage, tmp_path, limit=3000) for _ in range(3))
    for at, number in enumerate([0, 1]):
        os.utime(first.path(f"shard-{number}"), (at, at))
    there = []

    def fetch_another(name: str) -> None:
        there.append(sorted(path.name for path in tmp_path.glob("*/shard*")))
        if name == "shard-2":
            second.path("shard-3")
        elif name == "shard-3":
            third.path("shard-4")

    storage.during = fetch_another
    assert first.path("shard-2").read_bytes() == FILES["shard-2"]
    assert there == [["shard-0", "shard-1"], ["shard-1"], []]
    assert sorted(path.name for path in tmp_path.glob("*/shard*")) == ["shard-2", "shard-3", "shard-4"]


def test_no_other_process_counts_or_evicts_while_one_makes_room(tmp_path: Path, monkeypatch) -> None:
    storage = Counting(FILES)
    held = []

    def record() -> None:
        try:
            with hold(tmp_path / ".lock", timeout=0, what="test"):
                held.append(False)
        except LockTimeout:
            held.append(True)

    inventory, unlink, open_ = cache_room.inventory, Path.unlink, Path.open
    monkeypatch.setattr(cache_room, "inventory", lambda root: record() or inventory(root))
    small = cache_of(storage, tmp_path, limit=2000)
    for number in range(2):
        small.path(f"shard-{number}")
    assert held == [True, True]

    def unlink_recorded(path: Path, missing_ok: bool = False) -> None:
        if path.name == "shard-0":
            record()
        unlink(path, missing_ok=missing_ok)

    def open_recorded(path: Path, *arguments: object, **more: object) -> object:
        if path.name == ".shard-2.part" and arguments == ("wb",):
            record()
        return open_(path, *arguments, **more)

    os.utime(small.folder / "shard-0", (0, 0))
    monkeypatch.setattr(Path, "unlink", unlink_recorded)
    monkeypatch.setattr(Path, "open", open_recorded)
    small.path("shard-2")
    assert held == [True] * 5
    assert not (small.folder / "shard-0").exists()


def test_a_storage_that_writes_a_second_file_while_it_downloads_counts_once(tmp_path: Path) -> None:
    """boto3 and local copies write a temporary file next to the reserved one."""
    storage = Counting(FILES)
    small, other = (cache_of(storage, tmp_path, limit=3000) for _ in range(2))
    for at, number in enumerate([0, 1]):
        os.utime(small.path(f"shard-{number}"), (at, at))

    def make_room_for_another(name: str) -> None:
        if name == "shard-2":
            (small.folder / "..shard-2.part.4711").write_bytes(bytes(1000))
            (small.folder / ".shard-2.part.00aa").write_bytes(bytes(600))
            other.path("shard-3")

    storage.during = make_room_for_another
    small.path("shard-2")
    assert sorted(path.name for path in tmp_path.glob("*/shard*")) == ["shard-1", "shard-2", "shard-3"]


def test_a_cache_smaller_than_a_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.cache_gb"):
        cache_of(Counting(FILES), tmp_path, limit=999)


def test_on_a_disk_that_is_full_before_the_limit_older_files_make_room(tmp_path: Path, capfd) -> None:
    storage, room = Counting(FILES), 3000
    some = cache_of(storage, tmp_path, limit=10_000)

    def fill(_: str) -> None:
        if sum(path.stat().st_size for path in some.folder.glob("shard*")) + 1000 > room:
            raise NoSpace("shard.part: no space left on the device")

    storage.during = fill
    for at, number in enumerate([0, 1, 2, 3, 4]):
        worker = multiprocessing.get_context("fork").Process(target=some.path, args=(f"shard-{number}",))
        worker.start()
        worker.join()
        os.utime(some.folder / f"shard-{number}", (at, at))
    assert sorted(path.name for path in some.folder.glob("shard*")) == ["shard-2", "shard-3", "shard-4"]
    assert capfd.readouterr().out.count("no space left on the device, before data.cache_gb is used") == 1
    room = 0
    with pytest.raises(
        NoSpace, match=rf"^data.cache_dir: {tmp_path} on \S+: no space left on the device; free some, or"
    ):
        some.path("shard-5")
    assert not list(some.folder.glob("*.part"))


def test_the_room_that_the_disk_has_is_kept_before_a_download_fails(tmp_path: Path, monkeypatch) -> None:
    some = cache_of(Counting(FILES), tmp_path, limit=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3500 - used()))

    def used() -> int:
        return sum(path.stat().st_size for path in some.folder.glob("shard*"))

    for number in range(6):
        some.path(f"shard-{number}")
        assert used() <= 3000
    assert used() == 3000


def test_workers_that_fill_a_disk_at_once_go_on_one_after_the_other(tmp_path: Path) -> None:
    storage, all_at_once = Counting(FILES), threading.Barrier(4)
    caches = [cache_of(storage, tmp_path, limit=10_000) for _ in range(4)]

    def fill(_: str) -> None:  # room for two; four at once end at half of a shard each
        if len(storage.downloads) <= 4:
            all_at_once.wait(timeout=60)
            raise NoSpace("shard.part: no space left on the device")
        if sum(path.stat().st_size for path in tmp_path.glob("*/*shard-?*") if "lock" not in path.name) > 2000:
            raise NoSpace("shard.part: no space left on the device")

    storage.during = fill
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda number: caches[number].path(f"shard-{number}"), range(4)))
    assert [path.name for path in paths] == [f"shard-{number}" for number in range(4)]
    # What the disk has room for is found out by what is there when the downloads fail, of which some are gone by then.
    assert len(list(tmp_path.glob("*/shard*"))) in (1, 2)


def test_no_download_holds_the_lock_of_the_cache_on_a_full_disk_either(tmp_path: Path) -> None:
    storage = Counting(FILES, [NoSpace("shard.part: no space left on the device")] * 3)
    locked_in_downloads = []

    def look(_: str) -> None:
        try:
            with hold(tmp_path / ".lock", timeout=0, what="test"):
                locked_in_downloads.append(False)
        except LockTimeout:
            locked_in_downloads.append(True)

    storage.during = look
    assert cache_of(storage, tmp_path).path("shard-0").read_bytes() == FILES["shard-0"]
    assert locked_in_downloads == [False] * 4


def test_waiting_behind_downloads_that_go_on_is_no_fault(tmp_path: Path, monkeypatch) -> None:
    """Each of many workers may be slow, and they may have room for one at a time."""
    monkeypatch.setattr(cache_lock, "LOCK_MINUTES", 0.25 / 60)
    use_patience(0)
    some = cache_of(Counting(FILES), tmp_path, limit=1000)
    of_other, began = some.folder / ".shard-1.part", threading.Event()

    def download() -> None:
        with hold(of_other.with_name(".shard-1.lock"), timeout=0, what="a slow download"):
            began.set()
            for length in range(12):
                of_other.write_bytes(bytes(1000) + bytes(8192 * length))
                time.sleep(0.1)
            of_other.unlink()

    some.folder.mkdir()
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(download)
        assert began.wait(timeout=60)
        some.wait = time.sleep  # type: ignore[method-assign]
        some._room._wait = lambda _: time.sleep(0.05)
        assert some.path("shard-1").read_bytes() == FILES["shard-1"]  # whose lock the other one holds
        other.result()
        began.clear()
        other = threads.submit(download)
        assert began.wait(timeout=60)
        assert some.path("shard-2").read_bytes() == FILES["shard-2"]  # for which it leaves no room
        other.result()


def test_downloads_that_have_the_room_and_do_not_go_on_are_a_fault(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache_lock, "LOCK_MINUTES", 0.1 / 60)
    use_patience(0)
    some = cache_of(Counting(FILES), tmp_path, limit=1000)
    of_other = some.folder / ".shard-1.part"
    some.folder.mkdir()
    of_other.write_bytes(bytes(1000))
    with (
        hold(of_other.with_name(".shard-1.lock"), timeout=0, what="a download"),
        pytest.raises(RuntimeError, match=r"other processes' downloads, which do not go on, to make room"),
    ):
        some.path("shard-2")


def test_what_other_downloads_will_write_is_not_counted_as_free(tmp_path: Path, monkeypatch) -> None:
    storage = Counting(FILES)
    first, second = (cache_of(storage, tmp_path, limit=10_000) for _ in range(2))
    os.utime(first.path("shard-0"), (0, 0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1500))
    storage.during = lambda name: second.path("shard-2") if name == "shard-1" else None
    first.path("shard-1")
    assert sorted(path.name for path in first.folder.glob("shard*")) == ["shard-1", "shard-2"]


def test_what_killed_downloads_have_reserved_is_given_back(tmp_path: Path) -> None:
    left = tmp_path / "another set" / ".shard-7.part"
    left.parent.mkdir()
    left.write_bytes(bytes(2000))
    some = cache_of(Counting(FILES), tmp_path, limit=3000)
    with hold(left.with_name(".shard-7.lock"), timeout=0, what="its download is alive"):
        for at, number in enumerate([0, 1]):
            os.utime(some.path(f"shard-{number}"), (at, at))
    assert [path.name for path in some.folder.glob("shard*")] == ["shard-1"]
    some.path("shard-2")
    assert sorted(path.name for path in some.folder.glob("shard*")) == ["shard-1", "shard-2"]
    assert not left.exists()


def test_a_file_that_is_named_as_a_part_keeps_its_lock_and_what_it_has_reserved(tmp_path: Path) -> None:
    some = cache_of(Counting(FILES), tmp_path)
    lock, part = some.folder / ".a.part1.tar.lock", some.folder / ".a.part1.tar.part"
    with hold(lock, timeout=0, what="its download is alive"):
        part.write_bytes(bytes(1000))
        some.path("shard-0")
        assert lock.exists()
        assert part.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("what", ["folder", "lock", "root", "part"])
def test_a_disk_that_is_full_before_the_start_names_its_node_and_a_quota_none(
    what: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = Path.open

    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(cache, "default_cache_dir", lambda: tmp_path / "own")
    some = cache_of(Counting(FILES), tmp_path)
    if what == "part":
        monkeypatch.setattr(
            Path, "open", lambda path, *a, **k: full() if path.suffix == ".part" else open_(path, *a, **k)
        )
    elif what == "lock":
        monkeypatch.setattr("cmscale.io.locks._acquire", full)
    else:
        monkeypatch.setattr(Path, "mkdir", full)

    with pytest.raises(NoSpace) as caught:
        FileCache(Counting(FILES), {}, folder=None, name="set", limit=1) if what == "root" else some.path("shard-0")
    root = tmp_path / "own" if what == "root" else tmp_path
    where = " on node7: no space left on the device" if code == errno.ENOSPC else ": no space left in the quota"
    assert str(caught.value) == f"data.cache_dir: {root}{where}; free some, or name a folder on a larger disk"


def test_leftovers_of_a_killed_download_are_removed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    leftovers = [tmp_path / "set" / name for name in (".shard-2.part.1234abcd", "..shard-2.part.99", ".shard-2.part")]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    cache_of(Counting(FILES), tmp_path).path("shard-2")
    assert not any(leftover.exists() for leftover in leftovers)


def test_two_caches_of_one_node_fetch_a_file_once(tmp_path: Path) -> None:
    storage = Counting(FILES)
    caches = [cache_of(storage, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda one: one.path("shard-5"), caches))
    assert len(set(paths)) == 1
    assert storage.downloads == ["shard-5"]


def test_a_lock_held_for_too_long_is_a_fault_not_a_wait_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache_lock, "LOCK_MINUTES", 0.0)
    use_patience(0)
    lock = tmp_path / ".lock"
    once, again = (cache_lock.locked(lock, root=tmp_path) for _ in range(2))
    with once, pytest.raises(RuntimeError, match="another process"), again:
        pass


_STUCK_IN_A_DOWNLOAD = """
import os, sys
from cmscale.config import Data
from cmscale.data import open_batches
from cmscale.data.cache import FileCache
from cmscale.io.storage import LocalStorage
from cmscale.distributed.world import World

main = os.getpid()
reading, writing = os.pipe()
download, path = LocalStorage.download, FileCache.path

def stuck(self, key, target):
    if "00003" not in key or os.getpid() != main:
        return download(self, key, target)
    target.write_bytes(self.read(key)[:1000])
    os.write(writing, b"." * 100)
    sys.stdout.write("stuck\\n")
    sys.stdout.flush()
    sys.stdin.read()

def path_after_main(self, name):
    if "00003" in name and os.getpid() != main:
        os.read(reading, 1)  # the worker comes second
    return path(self, name)

LocalStorage.download, FileCache.path = stuck, path_after_main
config = Data(path=sys.argv[1], cache_dir=sys.argv[2], workers=1, num_canonical_nodes=3, shuffle_block=6)
batches = open_batches(config, World(), seed=4, global_batch_size=2, image_size=16)
sys.stdout.write(f"{batches._iterator._workers[0].pid}\\n")
sys.stdout.flush()
while True:
    next(batches)
"""


@pytest.mark.long
def test_a_lock_ends_with_its_holder_and_what_a_killed_reader_left_is_cleared(sets: dict[str, str], tmp_path: Path):
    """SIGKILL in the middle of a download, with workers: no lock, no shared memory, no process, no half file stays."""
    command = [sys.executable, "-c", _STUCK_IN_A_DOWNLOAD, sets["mds"], str(tmp_path)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    lines = [reader.stdout.readline() for _ in range(2)]
    lines.remove("stuck\n")
    worker = int(lines[0])
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
        with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
            kill_and_go_on()
    assert " (by hand, or memory ran out: see dmesg; " in str(with_advice(raised.value))


@pytest.mark.parametrize(
    "said",  # of one worker, the first two by torch; which of them depends on what the rank notices first
    [
        "(pid 7) is killed by signal: Killed. ",
        "(pid(s) 7) exited unexpectedly",
        "ended before it returned its batch (ConnectionResetError(104, 'Connection reset by peer'))",
    ],
)
def test_advice_about_a_killed_worker_does_not_depend_on_how_its_end_was_noticed(said: str) -> None:
    assert " (by hand, or memory ran out: see dmesg; " in str(with_advice(RuntimeError(f"DataLoader worker {said}")))


def _other(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Makes a path seem to belong to another user."""
    plain = Path.lstat

    class Other:
        def __init__(self, status: os.stat_result) -> None:
            self.st_mode, self.st_uid = status.st_mode, status.st_uid + 1

    monkeypatch.setattr(Path, "lstat", lambda self: Other(plain(self)) if self == path else plain(self))


def test_a_folder_in_tmp_that_somebody_else_made_or_may_write_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"cmscale-cache-{os.getuid()}"
    entry = FileEntry(name="shard-0", size=1000, sha256=hashlib.sha256(FILES["shard-0"]).hexdigest())

    def open_cache() -> FileCache:
        return FileCache(Counting(FILES), {"shard-0": entry}, folder=None, name="set", limit=1000)  # type: ignore[arg-type]

    open_cache().path("shard-0")
    assert folder.stat().st_mode & 0o777 == 0o700
    open_cache()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"others may write there \(mode 0777\); chmod go-w, or set data.cache_dir"):
        open_cache()
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        _other(patch, folder)
        with pytest.raises(
            UserError, match=rf"belongs to user {os.getuid() + 1}, not to {os.getuid()}; set data.cache"
        ):
            open_cache()
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="is no folder of this user's"):
        open_cache()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_takes_the_place_of_the_hashed_one_is_not_read(tmp_path: Path, in_place: bool) -> None:
    """By a rename, as somebody does who may write in the folder; the same size, and the times set back."""
    entry = FileEntry(name="shard-1", size=1000, sha256=hashlib.sha256(FILES["shard-1"]).hexdigest())
    if in_place:
        storage = LocalStorage(tmp_path)
        storage.write("shard-1", FILES["shard-1"])
        some = FileCache(storage, {"shard-1": entry}, folder=None, name="set", limit=1)
    else:
        some = cache_of(Counting(FILES), tmp_path)
    path = some.path("shard-1")
    times = path.stat()

    def swap(content: bytes) -> None:
        other = path.with_name("swapped")
        other.write_bytes(content)
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(path)

    swap(FILES["shard-1"])  # another file as good as the first
    with some.open("shard-1") as file:
        assert os.pread(file.fileno(), 1000, 0) == FILES["shard-1"]
    swap(FILES["shard-2"])
    if in_place:
        with pytest.raises(cache.BadFile, match="shard-1: damaged"):
            some.open("shard-1")
        return
    with some.open("shard-1") as file:
        assert os.pread(file.fileno(), 1000, 0) == FILES["shard-1"]
    assert path.read_bytes() == FILES["shard-1"]


def test_what_was_opened_stays_what_was_hashed(tmp_path: Path) -> None:
    some = cache_of(Counting(FILES), tmp_path)
    with some.open("shard-1") as file:
        other = tmp_path / "swapped"
        other.write_bytes(FILES["shard-2"])
        other.replace(some.folder / "shard-1")
        assert os.pread(file.fileno(), 1000, 0) == FILES["shard-1"]
