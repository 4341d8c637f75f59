"""Batches from both formats, on disk and on S3: the same sequence whatever the ranks, and no byte trusted."""

import json
import random
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
import torch
from data_fixtures import COUNT, FORMATS, Sample, collect, data, encoded_images, make, world

from cmscale.data import Batch, open_batches, read_images, to_device
from cmscale.data.samples import Samples
from cmscale.data.workers import with_advice
from cmscale.errors import UserError


@pytest.mark.long
def test_the_sequence_depends_on_no_rank_batch_stop_or_format(sets: dict[str, str]) -> None:
    reference, _ = collect(data(sets["mds"]), num_ranks=1, batch=24, start=0, steps=10)
    assert sorted(reference) == list(range(240))
    dice = random.Random(0)
    for _ in range(200):
        num_ranks = dice.choice([1, 2, 3, 4, 8])
        batch = num_ranks * dice.randint(1, 24 // num_ranks)
        start, steps = dice.randint(0, 150), dice.randint(1, 3)
        config = data(sets[dice.choice(FORMATS)], workers=dice.choice([0] * 30 + [1, 2]))
        found, cursor = collect(config, num_ranks=num_ranks, batch=batch, start=start, steps=steps)
        assert cursor == start + steps * batch
        assert sorted(found) == list(range(start, cursor))
        assert all(reference[position] == sample for position, sample in found.items())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(sets: dict[str, str], format: str, workers: int) -> None:
    alone = collect(data(sets[format]), num_ranks=2, batch=8, start=5, steps=7)
    assert collect(data(sets[format], workers=workers), num_ranks=2, batch=8, start=5, steps=7) == alone


def test_torch_says_nothing_of_more_workers_than_processors(
    sets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of the run does, once."""
    monkeypatch.setattr("torch._utils.cpu_count", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_batches(data(sets["mds"], workers=2), world(), seed=0, global_batch_size=4, image_size=16).close()


@pytest.mark.parametrize("format", FORMATS)
def test_every_sample_once_an_epoch_and_batches_straddle_epochs(sets: dict[str, str], format: str) -> None:
    found, _ = collect(data(sets[format]), num_ranks=1, batch=50, start=0, steps=2)
    keys = [found[position][0] for position in range(100)]
    for epoch in range(4):
        assert sorted(keys[epoch * COUNT : (epoch + 1) * COUNT]) == sorted(encoded_images(COUNT))


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_moves_between_two_one_and_three_ranks(sets: dict[str, str], format: str) -> None:
    straight, _ = collect(data(sets["mds"]), num_ranks=1, batch=12, start=0, steps=6)
    moved: dict[int, Sample] = {}
    cursor = 0
    for num_ranks in (2, 1, 3):
        found, cursor = collect(data(sets[format]), num_ranks=num_ranks, batch=12, start=cursor, steps=2)
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
    assert keys == sorted(encoded_images(COUNT))


def test_mds_samples_are_what_the_reader_of_mosaicml_streaming_gives(sets: dict[str, str]) -> None:
    from streaming.base.format import reader_from_json

    folder = Path(sets["mds"])
    samples = Samples(sets["mds"])
    shards = json.loads((folder / "index.json").read_bytes())["shards"]
    theirs = [sample for shard in shards for sample in reader_from_json(str(folder), "", shard)]
    assert [samples.read(index) for index in range(COUNT)] == [(one["key"], one["image"]) for one in theirs]


def test_tar_samples_are_what_webdataset_gives(sets: dict[str, str]) -> None:
    import webdataset

    samples = Samples(sets["webdataset"])
    shards = [str(Path(sets["webdataset"]) / shard.name) for shard in samples.manifest.shards]
    theirs = webdataset.WebDataset(shards, shardshuffle=False)
    assert [samples.read(index) for index in range(COUNT)] == [(one["__key__"], one["jpg"]) for one in theirs]


def test_a_batch_keeps_its_pixels_while_anybody_holds_a_view_and_its_memory_is_used_again_after(sets) -> None:
    def fresh():
        return open_batches(data(sets["mds"]), world(), seed=4, global_batch_size=4, image_size=16)

    with closing(fresh()) as batches:
        rows = [next(batches)[0].images[1] for _ in range(6)]
    with closing(fresh()) as batches:
        assert all(torch.equal(row, next(batches)[0].images[1]) for row in rows)
        assert len({next(batches)[0].images.data_ptr() for _ in range(6)}) == 1


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
    keys = sorted(encoded_images(COUNT))
    url = sets["webdataset"]
    assert [key for _, key in read_images(url, indices=[7, 2, 22])] == [keys[7], keys[2], keys[22]]
    assert [key for _, key in read_images(url, limit=3)] == keys[:3]
    with pytest.raises(UserError, match="no sample 23, there are 23"):
        list(read_images(url, indices=[23]))


# Processes ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_program_that_never_closes_its_batches_still_ends(sets: dict[str, str]) -> None:
    """Workers ignore SIGTERM; the end of the program must not wait for them. Nor does the other format's
    package, slow to import, burden its start."""
    code = (
        "import sys\n"
        "from cmscale.config import Data\n"
        "from cmscale.data import open_batches\n"
        "from cmscale.distributed.world import World\n"
        "b = open_batches(Data(path=sys.argv[1], workers=2), World(), seed=0, global_batch_size=4,\n"
        "                 image_size=16)\n"
        "next(b)\n"
        "print(*(w.pid for w in b._iterator._workers))\n"
        "assert not {'streaming', 'transformers', 'deepspeed'} & set(sys.modules)\n"
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


@pytest.mark.parametrize("full_at", ["_new_shared", "_share_fd_cpu_"])
def test_a_batch_that_shared_memory_has_no_room_for_is_an_error_not_a_wait_for_ever(
    sets: dict[str, str], full_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once where the images are decoded, once in the thread that sends a batch."""

    def fail(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, full_at, fail)
    batches = open_batches(data(sets["mds"], workers=1), world(), seed=0, global_batch_size=4, image_size=16)
    with closing(batches):
        until = time.monotonic() + 60
        assert batches.wait(60, leave=lambda: time.monotonic() > until)
        with pytest.raises(RuntimeError, match=r"^/dev/shm: a data worker can't .* or set data.workers=0$") as raised:
            next(batches)
    assert with_advice(raised.value) is raised.value


def test_between_batches_no_file_of_the_cache_is_open_as_deleted_ones_would_keep_their_space(sets, tmp_path) -> None:
    samples = Samples(sets["mds"], cache_dir=str(tmp_path))
    batches = open_batches(data(sets["mds"]), world(), seed=4, global_batch_size=8, image_size=16, samples=samples)
    with closing(batches):
        next(batches)
    assert samples._files == {}
    assert list(tmp_path.glob("*/shard*"))
