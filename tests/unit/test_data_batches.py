"""Batches from both formats, on disk and on S3: the same sequence whatever the ranks, and no byte trusted."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import encoded, picture, pictures, write_lmdb

from cmscale.config import Data
from cmscale.data import Batch, cache, open_batches, read_images, to_device
from cmscale.data.cache import FileCache
from cmscale.data.mds import MDSShards
from cmscale.data.samples import Samples
from cmscale.errors import UserError
from cmscale.manifests import FileEntry, dataset_fingerprint, read_dataset_manifest
from cmscale.storage import open_storage
from cmscale.world import World
from data_prep import prepare

COUNT = 23
FORMATS = ("mds", "webdataset")


def make(source: Path, out: str, format: str) -> str:
    arguments = ["--source", f"lsun:{source}", "--out", out, "--format", format, "--image-size", "16"]
    assert prepare.main([*arguments, "--samples-per-shard", "4", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lmdb(tmp_path_factory.mktemp("lsun") / "photo_train_lmdb", pictures(COUNT))


@pytest.fixture(scope="module")
def sets(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return {format: make(source, str(folder / format), format) for format in FORMATS}


def world(rank: int = 0, num_ranks: int = 1) -> World:
    return World(rank=rank, num_ranks=num_ranks, rank_of_node=rank, ranks_per_node=num_ranks)


def data(path: str, **more: object) -> Data:
    return Data.model_validate({"path": path, "workers": 0, "num_canonical_nodes": 3, "shuffle_block": 6, **more})


Sample = tuple[str, bool, bytes]


def collect(config: Data, *, num_ranks: int, batch: int, start: int, steps: int) -> tuple[dict[int, Sample], int]:
    """Every sample of some steps over all ranks, by its position, and the cursor after them."""
    found: dict[int, Sample] = {}
    cursor = start
    for rank in range(num_ranks):
        batches = open_batches(
            config, world(rank, num_ranks), seed=4, global_batch_size=batch, image_size=16, start_cursor=start
        )
        with closing(batches):
            for _ in range(steps):
                item, cursor = next(batches)
                assert item.images.shape == (batch // num_ranks, 3, 16, 16)
                assert item.images.dtype == torch.uint8
                for at, position in enumerate(item.positions):
                    assert position not in found
                    image = item.images[at].contiguous().numpy().tobytes()
                    found[position] = (item.keys[at], bool(item.flips[at]), image)
    return found, cursor


def test_the_sequence_depends_on_no_rank_batch_stop_or_format(sets: dict[str, str]) -> None:
    reference, _ = collect(data(sets["mds"]), num_ranks=1, batch=24, start=0, steps=10)
    assert sorted(reference) == list(range(240))
    dice = random.Random(0)
    for _ in range(60):
        num_ranks = dice.choice([1, 2, 3, 4, 8])
        batch = num_ranks * dice.randint(1, 24 // num_ranks)
        start, steps = dice.randint(0, 150), dice.randint(1, 3)
        config = data(sets[dice.choice(FORMATS)])
        found, cursor = collect(config, num_ranks=num_ranks, batch=batch, start=start, steps=steps)
        assert cursor == start + steps * batch
        assert sorted(found) == list(range(start, cursor))
        assert all(reference[position] == sample for position, sample in found.items())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(sets: dict[str, str], format: str, workers: int) -> None:
    alone = collect(data(sets[format]), num_ranks=2, batch=8, start=5, steps=7)
    assert collect(data(sets[format], workers=workers), num_ranks=2, batch=8, start=5, steps=7) == alone


@pytest.mark.parametrize("format", FORMATS)
def test_every_sample_once_an_epoch_and_batches_straddle_epochs(sets: dict[str, str], format: str) -> None:
    found, _ = collect(data(sets[format]), num_ranks=1, batch=50, start=0, steps=2)
    keys = [found[position][0] for position in range(100)]
    for epoch in range(4):
        assert sorted(keys[epoch * COUNT : (epoch + 1) * COUNT]) == sorted(pictures(COUNT))


def test_a_run_moves_between_two_one_and_three_ranks(sets: dict[str, str]) -> None:
    straight, _ = collect(data(sets["mds"]), num_ranks=1, batch=12, start=0, steps=6)
    moved: dict[int, Sample] = {}
    cursor = 0
    for num_ranks in (2, 1, 3):
        found, cursor = collect(data(sets["mds"]), num_ranks=num_ranks, batch=12, start=cursor, steps=2)
        moved |= found
    assert moved == straight


@pytest.mark.parametrize("format", FORMATS)
def test_s3_gives_what_the_folder_gives(source, sets, s3: str, tmp_path: Path, format: str) -> None:
    url = make(source, f"{s3}/set", format)
    config = data(url, workers=2, cache_dir=str(tmp_path / "cache"))
    there = collect(config, num_ranks=2, batch=8, start=0, steps=4)
    assert there == collect(data(sets[format]), num_ranks=2, batch=8, start=0, steps=4)


@pytest.mark.slow
def test_streaming_dataset_reads_the_mds_shards_too(sets: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from streaming import StreamingDataset\n"
        "d = StreamingDataset(remote=sys.argv[1], local=sys.argv[2], batch_size=1, validate_hash='sha256')\n"
        "print(*(sample['key'] for sample in (d[i] for i in range(len(d)))))\n"
    )
    command = [sys.executable, "-c", code, sets["mds"], str(tmp_path / "local")]
    keys = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert keys == sorted(pictures(COUNT))


def test_to_device_mirrors_and_normalises() -> None:
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    images[0, 0] = torch.tensor([[0, 255], [255, 0]])
    batch = Batch(images, (0, 1), ("a", "b"), torch.tensor([True, False]))
    out = to_device(batch, torch.device("cpu"))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0, 0], torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), rtol=0, atol=0)
    torch.testing.assert_close(out[1], images[1] / 127.5 - 1, rtol=0, atol=0)


@pytest.mark.parametrize("flip", [True, False])
def test_the_config_decides_on_flips(sets: dict[str, str], flip: bool) -> None:
    found, _ = collect(data(sets["mds"], flip=flip), num_ranks=1, batch=46, start=0, steps=1)
    assert {mirrored for _, mirrored, _ in found.values()} == ({True, False} if flip else {False})


def test_read_images_takes_ids_in_any_order_and_refuses_others(sets: dict[str, str]) -> None:
    keys = sorted(pictures(COUNT))
    url = sets["webdataset"]
    assert [key for _, key in read_images(url, indices=[7, 2, 22])] == [keys[7], keys[2], keys[22]]
    assert [key for _, key in read_images(url, limit=3)] == keys[:3]
    with pytest.raises(UserError, match="no sample 23, there are 23"):
        list(read_images(url, indices=[23]))


# Mistakes and distrust ------------------------------------------------------------------------------------


def test_mistakes_are_one_line(sets: dict[str, str], tmp_path: Path) -> None:
    def open_(path: str, size: int = 16, batch: int = 4, ranks: int = 1) -> None:
        open_batches(data(path), world(0, ranks), seed=0, global_batch_size=batch, image_size=size)

    with pytest.raises(UserError, match="no prepared data set there"):
        open_(str(tmp_path))
    with pytest.raises(UserError, match=r"holds images of 16 px, model.image_size is 32"):
        open_(sets["mds"], size=32)
    with pytest.raises(UserError, match="4 can't be shared by 3 ranks"):
        open_(sets["mds"], ranks=3)
    with pytest.raises(UserError, match=r"only local paths and s3://"):
        open_("pipe:cat /etc/passwd")


def spoil(url: str, name: str, how: str) -> None:
    storage = open_storage(url)
    content = storage.read(name)
    if how == "flipped":
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        storage.write(name, bytes(changed))
    elif how == "cut at a member":
        storage.write(name, content[: len(content) // 1024 * 512])
    elif how == "cut inside":
        storage.write(name, content[:-300])
    else:
        storage.delete(name)


SPOILT = ("flipped", "cut at a member", "cut inside", "missing")


@pytest.mark.parametrize(
    ("place", "format", "how"),
    [*(("folder", format, how) for format in FORMATS for how in SPOILT), ("s3", "mds", "flipped")]
    + [("s3", "webdataset", how) for how in ("cut at a member", "missing")],
)
def test_a_damaged_shard_stops_the_run_naming_it_and_its_hash(source, tmp_path, s3, format, how, place, monkeypatch):
    monkeypatch.setattr("cmscale.data.cache.ATTEMPTS", 2)
    monkeypatch.setattr("time.sleep", lambda _: None)
    url = make(source, str(tmp_path / "set") if place == "folder" else f"{s3}/set", format)
    shard = read_dataset_manifest(open_storage(url)).shards[2]
    spoil(url, shard.name, how)
    config = data(url, cache_dir=None if place == "folder" else str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=shard.sha256) as caught:
        collect(config, num_ranks=1, batch=COUNT, start=0, steps=1)
    assert shard.name in str(caught.value)


@pytest.mark.parametrize(("format", "how"), [*(("webdataset", how) for how in (*SPOILT, "stale")), ("mds", "flipped")])
def test_a_bad_file_in_the_cache_is_fetched_again(source, sets, tmp_path, s3, format: str, how: str) -> None:
    url = make(source, f"{s3}/set", format)
    config = data(url, cache_dir=str(tmp_path))
    expected = collect(config, num_ranks=1, batch=COUNT, start=0, steps=1)
    manifest = read_dataset_manifest(open_storage(url))
    cached = tmp_path / manifest.fingerprint[:16]
    if how == "stale":
        (cached / manifest.shards[2].name).write_bytes((cached / manifest.shards[1].name).read_bytes())
    else:
        spoil(str(cached), manifest.shards[2].name, how)
    assert collect(config, num_ranks=1, batch=COUNT, start=0, steps=1) == expected


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "pipe:cat x", "s3://b/x", "a/../../b"])
def test_names_that_leave_the_data_set_are_refused(sets: dict[str, str], tmp_path: Path, name: str) -> None:
    manifest = read_dataset_manifest(open_storage(sets["mds"]))
    shards = (manifest.shards[0].model_copy(update={"name": name}), *manifest.shards[1:])
    fingerprint = dataset_fingerprint(format="mds", image_size=16, preprocess="adm", encoding="jpeg", shards=shards)
    changed = manifest.model_copy(update={"shards": shards, "fingerprint": fingerprint})
    open_storage(tmp_path).write("manifest.json", changed.to_bytes())
    with pytest.raises(UserError, match="leaves the data set"):
        Samples(str(tmp_path))


def test_an_index_of_other_shards_is_refused(source: Path, tmp_path: Path) -> None:
    url = make(source, str(tmp_path / "set"), "mds")
    manifest = read_dataset_manifest(open_storage(url))
    with pytest.raises(UserError, match="does not list the shards"):
        MDSShards(tmp_path / "set" / "index.json", manifest.shards[1:])


def test_undecodable_images_stop_the_run_or_are_replaced_within_the_budget(tmp_path: Path) -> None:
    """Possible only where they were published so; the stand-in is the same on any rank."""
    samples = pictures(8)
    source = write_lmdb(tmp_path / "lmdb", samples)
    make(source, str(tmp_path / "set"), "webdataset")
    keys = sorted(samples)
    bad = encoded(picture(0, width=8, height=8), "jpeg")
    _publish_with(tmp_path / "set", index=1, image=bad)
    config = data(str(tmp_path / "set"), max_bad_samples=1)
    whole, _ = collect(config, num_ranks=1, batch=8, start=0, steps=2)
    assert [sample[0] for sample in whole.values()].count(keys[2]) == 4
    assert keys[1] not in {sample[0] for sample in whole.values()}
    assert collect(config, num_ranks=2, batch=8, start=0, steps=2)[0] == whole
    with pytest.raises(RuntimeError, match=f"{keys[1]}: is 8x8, not 16x16"):
        collect(data(str(tmp_path / "set")), num_ranks=1, batch=8, start=0, steps=2)


def _publish_with(folder: Path, *, index: int, image: bytes) -> None:
    """Replaces an image in the first shard by one no longer than it, and publishes the outcome."""
    storage = open_storage(folder)
    manifest = read_dataset_manifest(storage)
    begin, end = map(int, np.load(folder / "index.npy")[index])
    name = manifest.shards[0].name
    content = bytearray(storage.read(name))
    room = end - begin - 512
    assert len(image) <= room
    content[begin + 512 : end] = image.ljust(room, b"\0")
    storage.write(name, bytes(content))
    digest = hashlib.sha256(content).hexdigest()
    shards = (manifest.shards[0].model_copy(update={"sha256": digest}), *manifest.shards[1:])
    fingerprint = dataset_fingerprint(
        format="webdataset", image_size=16, preprocess="adm", encoding="jpeg", shards=shards
    )
    storage.write(
        "manifest.json", manifest.model_copy(update={"shards": shards, "fingerprint": fingerprint}).to_bytes()
    )


# The cache ------------------------------------------------------------------------------------------------


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
    with cache._locked(lock), pytest.raises(RuntimeError, match="another process"), cache._locked(lock):
        pass


# Processes ------------------------------------------------------------------------------------------------


def test_a_program_that_never_closes_its_batches_still_ends(sets: dict[str, str]) -> None:
    """Workers ignore SIGTERM; the end of the program must not wait for them."""
    code = (
        "import sys\n"
        "from cmscale.config import Data\n"
        "from cmscale.data import open_batches\n"
        "from cmscale.world import World\n"
        "b = open_batches(Data(path=sys.argv[1], workers=2), World(), seed=0, global_batch_size=4,\n"
        "                 image_size=16)\n"
        "next(b)\n"
        "print(*(w.pid for w in b._iterator._workers))\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sets["webdataset"]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert len(done.stdout.split()) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in done.stdout.split())


def test_workers_leave_the_signals_of_preemption_to_their_rank(sets: dict[str, str]) -> None:
    batches = open_batches(data(sets["webdataset"], workers=1), world(), seed=0, global_batch_size=4, image_size=16)
    next(batches)
    (worker,) = batches._iterator._workers
    status = Path(f"/proc/{worker.pid}/status").read_text()
    ignored = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn")), 16)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        assert ignored >> (number - 1) & 1
    batches.close()
    assert not worker.is_alive()
