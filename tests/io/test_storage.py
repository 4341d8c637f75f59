"""Storages: an object is whole or absent, conditional writes have one winner, a user's mistakes are one line."""

import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import memory_storage
import pytest
from fsyncs import record_fsyncs
from memory_storage import MemoryStorage

from cmscale.errors import NoSpace, UserError
from cmscale.interop.files import writable
from cmscale.io.fetch import local_file
from cmscale.io.local import LocalStorage
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import Storage, open_parent, open_storage, stored_entry
from cmscale.runs.checkpoints import committed_steps


@pytest.fixture(params=["local", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A fresh storage of each kind, one level below its root."""
    match request.param:
        case "local":
            yield open_storage(tmp_path / "root").sub("inner")
        case "s3":
            yield open_storage(request.getfixturevalue("s3")).sub("inner")
        case "memory":  # what other tests take for a third kind keeps the same promises
            yield MemoryStorage("root").sub("inner")
            memory_storage.clear()


def test_what_is_written_is_read(storage: Storage, tmp_path: Path) -> None:
    storage.write("a/b", b"one")
    storage.write("a/b", b"two")
    assert storage.read("a/b") == b"two"
    (tmp_path / "file").write_bytes(b"three")
    storage.upload("c", tmp_path / "file")
    storage.download("c", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"three"
    assert [(entry.key, entry.size) for entry in storage.list()] == [("a/b", 3), ("c", 5)]
    assert [entry.key for entry in storage.list("a/")] == ["a/b"]
    assert storage.sub("a").read("b") == b"two"


def test_every_storage_reports_absence_in_the_same_way(storage: Storage, tmp_path: Path) -> None:
    assert storage.read_if_present("nothing") is None
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    with pytest.raises(FileNotFoundError):
        storage.download("nothing", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    storage.delete("nothing")
    assert list(storage.list()) == []


def pages_of(storage: Storage, size: int) -> list[dict[str, object]]:
    """Makes an S3 storage answer a listing in pages of `size` objects. Returns the requests, as they come."""
    asked: list[dict[str, object]] = []

    def limit(params: dict[str, object], **_: object) -> None:
        params["MaxKeys"] = size
        asked.append(params)

    if isinstance(storage, S3Storage):
        storage.client.meta.events.register("before-parameter-build.s3.ListObjectsV2", limit)
    return asked


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_listings_have_every_object_and_folders_alone_whatever_the_pages(storage: Storage, page: int) -> None:
    keys = ["a", "a-1/x", "a-1/y/z", "a-1.txt", "a-2/x", "a-3/b/c", "a-3/x", "b-1/x", "b/x"]
    for key in keys:
        storage.write(key, b"data")
    asked = pages_of(storage, page)
    assert [entry.key for entry in storage.list()] == sorted(keys)
    assert [entry.key for entry in storage.list("a-")] == sorted(key for key in keys if key.startswith("a-"))
    assert storage.folders() == ["a-1", "a-2", "a-3", "b", "b-1"]
    assert storage.folders("a-") == ["a-1", "a-2", "a-3"]
    assert storage.folders("b") == ["b", "b-1"]
    assert storage.folders("c") == []
    assert [params["MaxKeys"] for params in asked] == [page] * len(asked)


def test_the_committed_copies_cost_an_answer_each_however_many_files_they_have(s3: str) -> None:
    storage = open_storage(s3)
    for step in range(4):
        names = [f"rank-{rank:04d}-of-0016.safetensors" for rank in range(16)]
        for name in (*names, *(["manifest.json"] if step != 2 else [])):
            storage.write(f"checkpoints/step-{step:09d}/{name}", b"data")
    copies = storage.sub("checkpoints")
    asked = pages_of(copies, 4)
    with patch.object(S3Storage, "sub", lambda *_: copies):
        assert committed_steps(storage) == [0, 1, 3]
    assert len(asked) == 1 + 4


def test_what_others_remove_while_a_folder_is_listed_is_not_there(tmp_path: Path, monkeypatch) -> None:
    storage, is_file = LocalStorage(tmp_path), Path.is_file
    for key in ("a/1", "b/1", "c"):
        storage.write(key, b"x")

    def removing(path: Path) -> bool:
        found = is_file(path)
        if path.name == "c" and found:
            shutil.rmtree(tmp_path / "b")
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", removing)
    assert [entry.key for entry in storage.list()] == ["a/1"]
    assert storage.folders() == ["a"]
    assert list(storage.list("gone/")) == []


def test_two_nodes_that_upload_one_file_at_once_do_not_meet(tmp_path: Path, monkeypatch) -> None:
    """Process ids of two nodes, as of these two threads, may be alike."""
    storage, copy, both = LocalStorage(tmp_path / "shared"), shutil.copyfile, threading.Barrier(2)
    (tmp_path / "file").write_bytes(b"content")

    def copied(source: Path, target: Path) -> None:
        copy(source, target)
        both.wait(timeout=60)

    monkeypatch.setattr(shutil, "copyfile", copied)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: storage.upload("file", tmp_path / "file"), range(2)))
    assert storage.read("file") == b"content"


def test_the_first_of_two_conditional_writers_wins(storage: Storage) -> None:
    assert storage.write_if_absent("manifest", b"mine")
    assert not storage.write_if_absent("manifest", b"theirs")
    assert storage.write_if_absent("manifest", b"mine")  # a retried write meets itself
    assert storage.read("manifest") == b"mine"


def test_a_write_that_fails_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("file", b"old")

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="no space left"):
        storage.write("file", b"new")
    monkeypatch.undo()
    assert storage.read("file") == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("way", ["write", "write_if_absent", "upload", "weights"])
def test_what_is_written_to_a_local_folder_is_on_the_disk_with_its_name(way: str, tmp_path: Path, monkeypatch) -> None:
    source, target = tmp_path / "source", tmp_path / "root" / "inner" / "file"
    source.write_bytes(b"bytes")
    synced = record_fsyncs(monkeypatch)
    storage, link = LocalStorage(tmp_path / "root"), os.link

    def record_link(existing: Path, new: Path) -> None:
        link(existing, new)
        synced.append(new)

    monkeypatch.setattr(os, "link", record_link)
    match way:
        case "write":
            storage.write("inner/file", b"bytes")
        case "write_if_absent":
            storage.write_if_absent("inner/file", b"bytes")
            assert synced[-2] == target  # linked before its name is made durable
        case "upload":
            storage.upload("inner/file", source)
        case "weights":
            with writable(storage, "inner/file", size=5) as path:
                path.write_bytes(b"bytes")
    assert target.read_bytes() == b"bytes"
    assert synced[-1] == target.parent  # the name, last
    assert [path for path in synced[:-1] if path.is_relative_to(target.parent) and path != target.parent]  # the bytes


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS])
def test_of_processes_that_write_where_no_hard_links_are_one_wins(number: int, tmp_path: Path, monkeypatch) -> None:
    """As on exFAT, SMB and many file systems in user space."""

    def no_links(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    storage, fork = LocalStorage(tmp_path), multiprocessing.get_context("fork")
    begin, won = fork.Event(), fork.Queue()

    def write(mine: bytes) -> None:
        begin.wait(timeout=60)
        won.put((mine, storage.write_if_absent("manifest", mine)))

    contents = [bytes([each]) * 100_000 for each in range(4)]
    writers = [fork.Process(target=write, args=(each,)) for each in contents]
    for each in writers:
        each.start()
    begin.set()
    winners = [mine for mine, is_first in (won.get(timeout=60) for _ in writers) if is_first]
    for each in writers:
        each.join()
    assert winners == [storage.read("manifest")]
    assert storage.write_if_absent("manifest", winners[0])
    assert [path.name for path in tmp_path.iterdir()] == ["manifest"]


def test_a_file_system_that_knows_no_modes_takes_weights(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "chmod", refuse)
    with writable(LocalStorage(tmp_path), "weights", size=5) as path:
        path.touch(mode=0o600)
        path.write_bytes(b"bytes")
    assert (tmp_path / "weights").read_bytes() == b"bytes"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_whose_folders_cannot_be_synced_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    LocalStorage(tmp_path).write("file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_disk_that_fails_while_a_folder_is_synced_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        LocalStorage(tmp_path).write("file", b"new")


@pytest.mark.parametrize("url", ["http://host/x", "pipe:cat", "gs://bucket/x", "s3://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError):
        open_storage(url)


def test_the_folder_of_a_single_object(tmp_path: Path) -> None:
    storage, key = open_parent("s3://bucket/a/b.pt")
    assert (storage.url, key) == ("s3://bucket/a", "b.pt")
    storage, key = open_parent(tmp_path / "b.pt")
    assert (storage.url, key) == (str(tmp_path), "b.pt")
    with pytest.raises(UserError):
        open_parent("s3://bucket")


def test_a_bucket_that_is_not_there_is_named(s3: str) -> None:
    del s3
    with pytest.raises(UserError, match="no bucket 'absent-bucket'"):
        open_storage("s3://absent-bucket/x").read("y")


def test_missing_credentials_are_named(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        open_storage(s3).read("x")


def test_an_asset_is_fetched_once_and_checked(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / "cache"))
    storage = open_storage(s3)
    storage.write("weights.pth", b"numbers")
    good = "a2e4ee7a1b1ee3a3d0a8a3a2f4d0f0f0"
    path = local_file(f"{s3}/weights.pth")
    assert path.read_bytes() == b"numbers"
    assert local_file(f"{s3}/weights.pth") == path
    path.write_bytes(b"NUMBERS")  # a copy that rotted is fetched again
    assert local_file(f"{s3}/weights.pth").read_bytes() == b"numbers"
    storage.write("weights.pth", b"another")  # and so is an object that was replaced, be its size the same
    assert local_file(f"{s3}/weights.pth").read_bytes() == b"another"
    with pytest.raises(UserError, match=good):
        local_file(f"{s3}/weights.pth#sha256={good}")
    with pytest.raises(UserError, match="no such object"):
        local_file(f"{s3}/absent.pth")
    with pytest.raises(UserError, match="no such file"):
        local_file(str(tmp_path / "absent.pth"))


@pytest.mark.parametrize(
    ("code", "where"),
    [(errno.ENOSPC, " on node7: no space left on the device"), (errno.EDQUOT, ": no space left in the quota")],
)
def test_a_full_disk_below_the_cache_of_assets_names_the_node_that_a_restart_can_avoid_and_a_quota_none(
    code: int, where: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    open_storage(s3).write("weights.pth", b"numbers")

    def no_space(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(NoSpace, match=rf"^{tmp_path}/cache/files{where}; free some, or let CMSCALE_CACHE name a"):
        local_file(f"{s3}/weights.pth")


def test_an_object_is_found_at_a_store_that_lists_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("s3://bucket/set")
    objects = [{"Key": f"set/{name}", "Size": 1, "ETag": name} for name in ("x.npz.parts/0", "x.npz", "x.npz.card")]
    monkeypatch.setattr(S3Storage, "_pages", lambda *_: iter([{"Contents": objects}]))
    found = stored_entry(storage, "x.npz")
    assert found is not None
    assert found.version == "x.npz"
    assert stored_entry(storage, "x.np") is None


def test_a_path_that_python_was_told_to_read_otherwise_need_not_be_renamed(tmp_path: Path) -> None:
    given = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from cmscale.io.storage import open_storage; open_storage(sys.argv[1])"
    answer = subprocess.run(
        [sys.executable, "-c", code, f"{tmp_path}/\u00e9"], env=os.environ | given, capture_output=True, check=False
    )
    assert b"Python reads it as ascii: set PYTHONUTF8=1" in answer.stderr
    with pytest.raises(UserError, match="is not UTF-8, which documents could not name; rename it"):
        open_storage(f"{tmp_path}/\udcff")
