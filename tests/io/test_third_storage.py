"""A kind of storage that the package does not know carries everything: nothing asks what kind it is."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import memory_storage
import pytest
import torch
from data_fixtures import COUNT, collect, data, encoded_images, make, write_lmdb
from flat_state import StandIn, flat_config
from memory_storage import MemoryStorage

from cmscale.distributed.world import World
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import list_checkpoints, read_weights, verify_checkpoint
from cmscale.engine.export import Exporter
from cmscale.engine.fence import claim_generation
from cmscale.errors import UserError
from cmscale.interop.files import located, readable, writable
from cmscale.io import storage
from cmscale.io.fetch import UNUSED_DAYS, file_sha256, local_file
from cmscale.io.process import CHECKOUT
from cmscale.io.protocol import Entry
from cmscale.io.storage import has_object, open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.copies import pending_copies
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState
from data_prep import verify
from launchers.checks import check_dataset, check_exists, check_export


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setitem(storage.SCHEMES, "memory", MemoryStorage.from_url)
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / "cache"))
    yield
    memory_storage.clear()


def test_checkpoints_are_exported_listed_verified_and_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    exporter = Exporter(run, "memory://bucket/runs")
    writer = Checkpoints(
        run, flat_config(), World(), generation=claim_generation(run), data_fingerprint="data", exporter=exporter
    )
    for step in (10, 20):
        writer.save(TrainState(step=step, cursor=step), StandIn(0, 1, seed=step))  # pyright: ignore[reportArgumentType]
    assert writer.close()
    assert exporter.close(patience=60) == set()
    copy = "memory://bucket/runs/run"
    assert committed_steps(copy) == committed_steps(run) == [10, 20]
    assert pending_copies(run, "memory://bucket/runs") == []
    listed = list_checkpoints(copy)[-1]
    assert listed.url == f"{copy}/checkpoints/step-000000020"
    assert verify_checkpoint(listed.url) == []
    here, there = read_weights(run.checkpoint(20), "target"), read_weights(listed.url, "target")
    assert all(torch.equal(here[name], there[name]) for name in here)
    copy_storage = memory_storage.MemoryStorage.from_url(listed.url)
    (part,) = [entry.key for entry in copy_storage.list("rank-")]
    copy_storage.write(part, b"other")
    assert verify_checkpoint(listed.url) == [f"{listed.url}/{part}: has 5 bytes, the manifest says {_size(run)}"]
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        check_export("memory://bucket/runs", "run", is_new=True)


def _size(run: RunDir) -> int:
    return (run.checkpoint(20) / "rank-0000-of-0001.safetensors").stat().st_size


def test_a_data_set_is_prepared_checked_and_read(tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "lmdb", encoded_images(COUNT))
    for kind in ("mds", "webdataset"):
        url = make(source, f"memory://bucket/{kind}", kind)
        local = make(source, str(tmp_path / kind), kind)
        assert check_dataset(url, image_size=16).count == COUNT
        assert verify.main([url]) == 0
        read = {"num_ranks": 1, "batch": COUNT, "start": 0, "steps": 1}
        assert collect(data(url, cache_dir=str(tmp_path / "read")), **read) == collect(data(local), **read)


def test_weights_are_written_fetched_once_and_checked(tmp_path: Path) -> None:
    url = "memory://bucket/weights.pt"
    with pytest.raises(UserError, match=f"teacher: {url}: no such object"):
        check_exists(url, key="teacher")
    with pytest.raises(UserError, match=f"{url}: no such object"):
        local_file(url)
    with writable(*located(url), size=3) as path:
        path.write_bytes(b"one")
    check_exists(url, key="teacher")
    with readable(*located(url)) as path:
        digest = file_sha256(path)
    first = local_file(f"{url}#sha256={digest}")
    assert (first.read_bytes(), local_file(url)) == (b"one", first)
    open_storage("memory://bucket").write("weights.pt", b"two")
    assert local_file(url).read_bytes() == b"two"
    with pytest.raises(UserError, match="it is another file"):
        local_file(f"{url}#sha256={digest}")


def test_copies_that_nobody_has_used_for_a_month_make_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = open_storage("memory://bucket")
    for name in ("old", "used", "new", "newer"):
        bucket.write(name, name.encode())
    old, used = (local_file(f"memory://bucket/{name}") for name in ("old", "used"))
    bucket.write("old", b"a newer version")
    month_ago = time.time() - 86_400 * (UNUSED_DAYS + 1)
    for copy in (old, used):
        os.utime(f"{copy}.sha256", (month_ago, month_ago))
    assert local_file("memory://bucket/used") == used
    with monkeypatch.context() as other_user:  # who shares the folder
        other_user.setattr(os, "getuid", lambda: 12345)
        newer = local_file("memory://bucket/newer")
    assert old.exists()
    new = local_file("memory://bucket/new")
    assert sorted(path for path in used.parent.iterdir() if path.suffix == "") == sorted((used, newer, new))
    assert not Path(f"{old}.sha256").exists()


def test_no_module_but_those_of_the_storages_asks_for_a_kind_of_storage() -> None:
    asks = re.compile(r'startswith\(\(?"(?:s3|file):|isinstance\([^)]*(?:LocalStorage|S3Storage)|S3Storage')
    files = [path for room in ("cmscale", "launchers", "data_prep") for path in (CHECKOUT / room).rglob("*.py")]
    found = [str(path) for path in files if path.parent.name != "io" and asks.search(path.read_text())]
    assert found == []


def test_whether_an_object_is_there_is_known_without_a_walk_through_those_that_begin_with_its_name(monkeypatch) -> None:
    for number in range(3):
        open_storage(f"memory://bucket/runs/a-{number}").write("file", b"x")
    open_storage("memory://bucket/runs").write("b/file", b"x")
    listed, seen = MemoryStorage.list, []

    def listed_and_counted(self: MemoryStorage, prefix: str = "") -> Iterator[Entry]:
        for entry in listed(self, prefix):
            seen.append(entry.key)
            yield entry

    monkeypatch.setattr(MemoryStorage, "list", listed_and_counted)
    monkeypatch.setattr("cmscale.io.storage._IN_ONE_ANSWER", 2)
    parent = open_storage("memory://bucket/runs")
    looks = (
        lambda: check_exists("memory://bucket/runs/a", key="method.teacher"),
        lambda: local_file("memory://bucket/runs/a"),
        lambda: readable(parent, "a").__enter__(),
    )
    for look in looks:
        seen.clear()
        with pytest.raises(UserError, match="no such object"):
            look()
        assert len(seen) <= 2
    seen.clear()
    assert not has_object(parent, "a")
    check_exists("memory://bucket/runs/b", key="method.teacher")
    assert len(seen) == 4
