"""Reads from an S3 server that misbehaves, over real sockets: retried with growing waits, then one line."""

import re
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest
from data_fixtures import COUNT, collect, data, make, world
from fault_proxy import FaultProxy
from outages import pass_time, use_patience

from cmscale.config.storage import StorageKeys
from cmscale.data import cache, open_batches
from cmscale.data.samples import Samples
from cmscale.errors import UserError
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest
from data_prep import prepare, verify

SHARD = r"GET .*shard"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits for storage and between downloads, recorded instead of slept; time passes all the same."""
    clock = pass_time(monkeypatch)
    monkeypatch.setattr("cmscale.data.cache._wait", clock.waits.append)
    return clock.waits


def read(url: str, folder: Path, **more: object):
    return collect(data(url, cache_dir=str(folder), **more), num_ranks=1, batch=COUNT, start=0, steps=1)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("503", SHARD),
        ("503", "manifest"),
        ("slow", SHARD),
        ("reset", SHARD),
        ("reset after", SHARD),
        ("truncate", SHARD),
        ("truncate", "index.json"),
        ("corrupt", SHARD),
        ("corrupt", "index.json"),
    ],
)
def test_a_fault_that_passes_changes_nothing(source, sets, proxy: FaultProxy, s3, tmp_path, waits, fault, match):
    url = make(source, f"{s3}/set", "mds")
    rule = proxy.add(fault, match=match, times=2)
    assert read(url, tmp_path) == read(sets["mds"], tmp_path / "other")
    assert rule.used == 2
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize("fault", ["503", "reset", "truncate"])
def test_a_fault_that_stays_is_tried_again_with_growing_waits_and_then_one_line(
    source, proxy: FaultProxy, s3, tmp_path, waits, fault
):
    url = make(source, f"{s3}/set", "webdataset")
    rule = proxy.add(fault, match=r"GET .*shard-00003")
    waits.clear()
    samples = Samples(url, cache_dir=str(tmp_path))
    use_patience(1)
    began = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        samples.read(13)
    asking = time.monotonic() - began  # is part of the patience, too
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)
    assert rule.used >= len(waits) >= 6
    assert 60 - asking <= sum(waits) <= 62  # once, not once for each attempt of the cache
    assert all(wait >= min(0.25 * 2**number, 3.0) for number, wait in enumerate(waits[:5]))


def test_a_body_that_is_corrupt_each_time_is_refused_by_its_hash_or_replaced_within_the_budget(
    source, proxy: FaultProxy, s3, tmp_path, waits
):
    url = make(source, f"{s3}/set", "mds")
    shard = read_dataset_manifest(open_storage(url)).shards[3]
    rule = proxy.add("corrupt", match=f"GET .*{shard.name}")
    with pytest.raises(RuntimeError, match=f"{shard.name}: damaged; expected {shard.size} bytes with SHA-256"):
        read(url, tmp_path)
    assert rule.used == cache.ATTEMPTS
    found, _ = read(url, tmp_path, max_bad_shards=1)
    assert len(found) == COUNT
    assert rule.used == 2 * cache.ATTEMPTS  # once a start, not once a sample


@pytest.mark.long
def test_a_server_that_falls_silent_is_left_after_a_while(source, proxy: FaultProxy, s3, tmp_path, waits, monkeypatch):
    url = make(source, f"{s3}/set", "mds")
    monkeypatch.setattr("cmscale.io.s3_client.READ_SECONDS", 0.05)
    rule = proxy.add("stall", match=SHARD)
    use_patience(0.1)
    with pytest.raises(ConnectionError, match="does not answer"):
        read(url, tmp_path)
    assert rule.used >= 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_ends_workers_and_ranks_with_the_same_line(source, proxy, s3, tmp_path, waits, monkeypatch, workers):
    url = make(source, f"{s3}/set", "mds")
    use_patience(0)
    config = data(url, cache_dir=str(tmp_path), workers=workers)
    proxy.add("503", match=SHARD)
    batches = open_batches(config, world(), seed=0, global_batch_size=4, image_size=16)
    with closing(batches), pytest.raises(ConnectionError, match=r"^s3://[^\n]*SlowDown[^\n]*$"):
        next(batches)


def test_a_wrong_endpoint_is_one_line(s3, tmp_path, capsys, waits, monkeypatch, source) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(StorageKeys, "apply", lambda self, *, interactive=False: use_patience(0))
    use_patience(0)
    with pytest.raises(ConnectionError, match=r"^s3://\S+: the S3 server does not answer[^\n]*127.0.0.1:1"):
        read(f"{s3}/set", tmp_path)
    for status in (
        verify.main([f"{s3}/set"]),
        prepare.main(["--source", f"lsun:{source}", "--format", "mds", "--out", f"{s3}/set", "--image-size", "16"]),
    ):
        assert status == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # and none about a wait
    assert all(line.startswith(f"error: {s3}/set: the S3 server does not answer") for line in lines)


def test_wrong_credentials_are_a_users_mistake_in_one_line_and_not_tried_again(proxy, s3, tmp_path, waits) -> None:
    rule = proxy.add("403")
    with pytest.raises(UserError, match=r"refuses the credentials \(InvalidAccessKeyId\); check AWS_ACCESS_KEY_ID"):
        read(f"{s3}/set", tmp_path)
    assert rule.used == 1
    assert waits == []


@pytest.mark.parametrize("fault", ["503", "reset", "reset after"])
def test_prepare_and_verify_go_on_through_faults_of_uploads(source, sets, proxy, s3, waits, capsys, fault) -> None:
    rules = [proxy.add(fault, match=f"PUT .*{name}", times=2) for name in ("shard.00002", "manifest.json")]
    url = make(source, f"{s3}/set", "mds")
    assert [rule.used for rule in rules] == [2, 2]
    proxy.clear()
    assert verify.main([url]) == 0
    storage, local = open_storage(url), open_storage(sets["mds"])
    assert {e.key: storage.read(e.key) for e in storage.list()} == {e.key: local.read(e.key) for e in local.list()}


@pytest.mark.parametrize("fault", ["corrupt upload", "corrupt"])
def test_a_shard_that_comes_back_damaged_is_named_by_verify(source, proxy: FaultProxy, s3, waits, capsys, fault):
    proxy.add(fault, match=r"(PUT|GET) .*shard.00002")
    url = make(source, f"{s3}/set", "mds")
    capsys.readouterr()
    assert verify.main([url]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad:")]
    assert line.startswith("bad: shard.00002.mds: ")


def test_a_preparation_that_continues_ends_the_unfinished_uploads_of_its_own_and_no_others(source, s3, monkeypatch):
    class Killed(Exception):
        pass

    with monkeypatch.context() as interrupted:
        interrupted.setattr("data_prep.prepare.make_missing", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            make(source, f"{s3}/set", "mds")
    for name in ("set", "other"):
        one = open_storage(f"{s3}/{name}")
        one.client.create_multipart_upload(Bucket=one.bucket, Key=one._key("shard.00001.mds"))
    make(source, f"{s3}/set", "mds")
    left = one.client.list_multipart_uploads(Bucket=one.bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["other/shard.00001.mds"]


def test_credentials_that_expire_while_a_program_runs_are_read_again(proxy, s3: str, tmp_path: Path, monkeypatch):
    """On many clusters somebody renews the session token in ~/.aws/credentials every few hours."""
    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    keys = "[default]\naws_access_key_id = {0}\naws_secret_access_key = secret\naws_session_token = {0}\n"

    def who() -> str:
        return re.findall("AccessKeyId=([a-z]+)", storage.client.generate_presigned_url("list_buckets"))[0]

    file.write_text(keys.format("old"))
    storage = open_storage(s3)
    storage.write("file", b"bytes")
    assert who() == "old"
    file.write_text(keys.format("new"))
    proxy.add("answer 400 ExpiredToken", times=1)
    assert storage.read("file") == b"bytes"
    assert who() == "new"
    proxy.add("answer 400 ExpiredToken")
    with pytest.raises(UserError, match="have expired or are no longer valid"):
        storage.read("file")
