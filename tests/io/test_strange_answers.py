"""Answers other than the truth: errors with status 200, cut bodies, lost answers, clocks, lagging listings."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from fault_proxy import FaultProxy
from flat_state import StandIn, flat_config
from outages import pass_time

from cmscale.distributed.world import World
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import list_checkpoints, read_weights, verify_checkpoint
from cmscale.engine.export import Exporter
from cmscale.engine.fence import claim_generation
from cmscale.errors import UserError
from cmscale.io import s3_upload
from cmscale.io.fetch import file_sha256, local_file
from cmscale.io.probe import probe
from cmscale.io.protocol import ArrivedChanged, StorageAway
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import Storage, open_storage
from cmscale.runs.checkpoint_copy import NotIntact, copy_checkpoint
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState

UNUSUAL = "a b+c%20d/é ü/~!*'()/&$@=:,/#?/-.._"


@pytest.fixture
def storage(s3: str, proxy: FaultProxy) -> Storage:
    return open_storage(f"{s3}/x")


def save(run: RunDir, *steps: int, exporter: Exporter | None = None) -> None:
    config = flat_config("checkpoint.keep_last=9")
    generation = claim_generation(run)
    writer = Checkpoints(run, config, World(), generation=generation, data_fingerprint="data", exporter=exporter)
    for step in steps:
        writer.save(TrainState(step=step, cursor=8 * step), StandIn(0, 1, seed=step))  # pyright: ignore[reportArgumentType]
    assert writer.close()


def read(storage: Storage, folder: Path) -> bytes:
    del folder
    return storage.read("a")


def download(storage: Storage, folder: Path) -> bytes:
    storage.download("a", folder / "a")
    return (folder / "a").read_bytes()


@pytest.mark.parametrize("way", [read, download])
def test_an_error_that_is_sent_as_an_object_is_waited_for(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, monkeypatch, way: Callable[[Storage, Path], bytes]
) -> None:
    storage.write("a", b"data" * 100)
    clock = pass_time(monkeypatch)
    proxy.add("error as object", match="GET .*/a", times=2)
    assert way(storage, tmp_path) == b"data" * 100
    assert len(clock.waits) == 2
    proxy.add("error as object", match="GET .*/a")
    with pytest.raises(StorageAway, match="answered 200 with the error InternalError"):
        way(storage, tmp_path)


def test_an_error_of_a_listing_with_status_200_is_no_empty_listing(storage: Storage, proxy: FaultProxy, monkeypatch):
    storage.write("a/b", b"data")
    clock = pass_time(monkeypatch)
    proxy.add("error as object", match="GET .*list-type", times=4)  # of which botocore repeats two at once
    assert storage.folders() == ["a"]
    assert [entry.key for entry in storage.list()] == ["a/b"]
    assert len(clock.waits) == 1


@pytest.mark.parametrize("fault", ["cut", "corrupt", "truncate"])
def test_a_document_that_arrives_otherwise_than_it_is_there_is_read_again(
    storage: Storage, proxy: FaultProxy, monkeypatch, fault: str
) -> None:
    pass_time(monkeypatch)
    storage.write("a", b"0123456789")
    proxy.add(fault, match="GET .*/a", times=1)
    assert storage.read("a") == b"0123456789"


def test_of_a_body_without_a_fitting_hash_two_equal_ones_count(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys of one's own an ETag looks like an MD5 and is none."""
    storage = open_storage(s3)
    assert isinstance(storage, S3Storage)
    bodies = [b"one", b"two", b"two", b"three"]
    monkeypatch.setattr(storage, "_get", lambda *_: (bodies.pop(0), "0" * 32))
    assert storage.read("a") == b"two"
    bodies[:] = [b"1", b"2", b"3", b"4"]
    with pytest.raises(ArrivedChanged, match="a: arrived changed, each of 4 times otherwise"):
        storage.read("a")


@pytest.mark.parametrize("fault", ["cut", "corrupt"])
def test_a_checkpoint_that_is_changed_on_the_way_once_is_no_damaged_one(
    s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch, fault: str
) -> None:
    run = RunDir(tmp_path / "run")
    save(run, 10, exporter=(exporter := Exporter(run, s3)))
    assert exporter.finish(patience=60) == ""
    copy = list_checkpoints(f"{s3}/run")[0].url
    pass_time(monkeypatch)
    for number, match in enumerate(("manifest", "rank-0000")):
        proxy.add(fault, match=f"GET .*{match}", times=1)
        copy_checkpoint(open_storage(copy), tmp_path / str(number))
        assert verify_checkpoint(tmp_path / str(number)) == []
    part = next(entry.key for entry in open_storage(copy).list("rank"))
    digest = file_sha256(run.checkpoint(10) / "rank-0000-of-0001.safetensors")
    proxy.add(fault, match="GET .*rank-0000", times=1)
    assert file_sha256(local_file(f"{copy}/{part}#sha256={digest}")) == digest
    proxy.add(fault, match="GET .*rank-0000")
    with pytest.raises(NotIntact, match="SHA-256 differs"):
        copy_checkpoint(open_storage(copy), tmp_path / "never")


def test_a_clock_that_goes_wrong_in_the_middle_is_waited_for_and_at_the_start_is_an_error(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = pass_time(monkeypatch)
    proxy.add("answer 403 RequestTimeTooSkewed", times=1)
    with pytest.raises(UserError, match=r"clock differs .*set it \(chronyd, ntpd\)"):
        open_storage(s3).read_if_present("a")
    assert clock.waits == []
    open_storage(s3).write("a", b"data")
    proxy.add("answer 403 RequestTimeTooSkewed", times=3)
    assert open_storage(s3).read("a") == b"data"
    assert len(clock.waits) == 3
    assert "this machine's clock differs from the server's" in capsys.readouterr().err


def test_a_completed_upload_whose_answer_was_lost_is_there_once_and_whole(
    storage: Storage, proxy: FaultProxy, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    pass_time(monkeypatch)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(11 << 20))
    for fault, times in (("reset after", 1), ("reset after", 3), ("error as object", 1)):
        rule = proxy.add(fault, match="POST .*uploadId", times=times)
        storage.upload("large", path)
        assert rule.used == times
        storage.download("large", tmp_path / "again")
        assert file_sha256(tmp_path / "again") == file_sha256(path)
        storage.delete("large")
        assert storage.abort_uploads(lambda _: True) == 0


def locked_bucket(s3: str) -> str:
    """A bucket with versions, each of which nobody can remove for a day."""
    client, bucket = boto3.session.Session().client("s3"), f"{s3.removeprefix('s3://')}-locked"
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    retention = {"Mode": "COMPLIANCE", "Days": 1}
    client.put_object_lock_configuration(
        Bucket=bucket,
        ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": retention}},
    )
    return f"s3://{bucket}"


def test_a_bucket_with_versions_and_a_lock_works_and_what_is_deleted_is_gone(s3: str, tmp_path: Path) -> None:
    url = locked_bucket(s3)
    assert [found for found in probe(open_storage(url)) if found.problem] == []
    run = RunDir(tmp_path / "run")
    settings = flat_config("checkpoint.export_keep_last=1").checkpoint
    exporter = Exporter(run, url, settings=settings)
    save(run, 10, 20, 30, exporter=exporter)
    assert exporter.finish(patience=60) == ""
    assert [copy.step for copy in list_checkpoints(f"{url}/run")] == [30]
    storage = open_storage(url)
    assert storage.write_if_absent("run/checkpoints/step-000000010/manifest.json", b"new") is True  # over a deletion
    assert storage.read("run/checkpoints/step-000000010/manifest.json") == b"new"


def test_names_with_unusual_characters_are_keys_like_others(s3: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/{UNUSUAL}")
    assert [found for found in probe(storage) if found.problem] == []
    for name in ("x", "p q/y", "p+q/z%"):
        storage.write(name, json.dumps(name).encode())
    assert [entry.key for entry in storage.list()] == ["p q/y", "p+q/z%", "x"]
    assert storage.folders() == ["p q", "p+q"]
    assert [json.loads(storage.read(entry.key)) for entry in storage.list("p")] == ["p q/y", "p+q/z%"]
    run = RunDir(tmp_path / UNUSUAL.replace("/", "-"))
    exporter = Exporter(run, f"{s3}/{UNUSUAL}")
    save(run, 10, exporter=exporter)
    assert exporter.finish(patience=60) == ""
    (copy,) = list_checkpoints(f"{s3}/{UNUSUAL}/{run.name}")
    assert verify_checkpoint(copy.url) == []
    here, there = read_weights(run.checkpoint(10), "master"), read_weights(copy.url, "master")
    assert all((here[name] == there[name]).all() for name in here)


def test_a_listing_that_lags_behind_hides_no_copy_that_is_there_and_publishes_nothing_twice(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    save(run, 10, 20)
    assert Exporter(run, s3).finish(patience=60) == ""
    before = [(entry.key, entry.version) for entry in open_storage(f"{s3}/run").list("checkpoints/")]
    with monkeypatch.context() as lagging:
        lagging.setattr(S3Storage, "_pages", lambda *_, **__: iter([{}]))
        assert Exporter(run, s3).finish(patience=60) == ""
    assert [(entry.key, entry.version) for entry in open_storage(f"{s3}/run").list("checkpoints/")] == before
