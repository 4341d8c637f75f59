"""Files come from S3 in parts: each is asked for again by itself, and never are two objects mixed."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_proxy import FaultProxy
from outages import pass_time

from cmscale.errors import UserError
from cmscale.io import s3_download
from cmscale.io.patience import GivenUp
from cmscale.io.protocol import ArrivedChanged, StorageAway
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage

PART = 1000


def body(size: int, *, seed: int = 0) -> bytes:
    return bytes((seed + number * 7) % 251 for number in range(size))


@pytest.fixture
def storage(s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    monkeypatch.setattr(s3_download, "PART_BYTES", PART)
    pass_time(monkeypatch)
    storage = open_storage(f"{s3}/x")
    assert isinstance(storage, S3Storage)
    return storage


def downloaded(storage: S3Storage, folder: Path) -> bytes:
    storage.download("a", folder / "a")
    assert [path.name for path in folder.iterdir()] == ["a"]
    return (folder / "a").read_bytes()


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 500])
def test_every_length_arrives(storage: S3Storage, tmp_path: Path, size: int) -> None:
    storage.write("a", body(size))
    assert downloaded(storage, tmp_path) == body(size)


def test_a_part_that_failed_is_asked_for_again_alone(storage: S3Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    storage.write("a", body(5 * PART))
    del proxy.log[:]
    rule = proxy.add("truncate", match="GET .*/a", times=1, after=3)
    assert downloaded(storage, tmp_path) == body(5 * PART)
    assert rule.used == 1
    assert len(proxy.log) == 6


def test_a_part_that_arrives_cut_is_not_taken(storage: S3Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    storage.write("a", body(3 * PART))
    proxy.add("cut", match="GET .*/a", times=1, after=1)
    assert downloaded(storage, tmp_path) == body(3 * PART)
    proxy.add("cut", match="GET .*/a")
    with pytest.raises(ArrivedChanged, match=r"a: 500 bytes arrived at 0, where the server has bytes 0-999/3000"):
        storage.download("a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_parts_of_an_object_that_is_replaced_meanwhile_are_not_mixed(
    storage: S3Storage, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("a", body(3 * PART))
    plain, asked = proxy.fault_of, 0

    def fault_of(request: str) -> str:
        nonlocal asked
        if re.match("GET .*/a", request):
            asked += 1
            if asked == 2:
                open_storage(storage.url).write("a", body(2 * PART, seed=99))
        return plain(request)

    monkeypatch.setattr(proxy, "fault_of", fault_of)
    assert downloaded(storage, tmp_path) == body(2 * PART, seed=99)


def test_a_server_that_knows_no_parts_sends_all_at_once(storage: S3Storage, tmp_path: Path, monkeypatch) -> None:
    storage.write("a", body(3 * PART))
    client = storage.client
    get: Any = client.get_object
    monkeypatch.setattr(client, "get_object", lambda *, Range, **names: get(**names))
    assert downloaded(storage, tmp_path) == body(3 * PART)


def test_a_part_that_waits_for_the_storage_gives_up_when_another_one_has_failed(
    storage: S3Storage, tmp_path: Path
) -> None:
    is_away, gave_up = threading.Event(), []

    def get_object(Range: str) -> dict[str, Any]:
        if Range == f"bytes=0-{PART - 1}":
            parts = SimpleNamespace(iter_chunks=lambda _: [body(PART)])
            return {"Body": parts, "ContentRange": f"bytes 0-{PART - 1}/{3 * PART}"}
        if Range.startswith(f"bytes={PART}-"):
            assert is_away.wait(60)
            raise UserError("not allowed")
        is_away.set()
        raise StorageAway("away")

    def ask(key: str, call: Callable[[Any], Any], *, given_up: threading.Event | None = None) -> Any:
        for _ in range(6000):
            if given_up is not None and given_up.is_set():
                gave_up.append(key)
                raise GivenUp
            try:
                return call(SimpleNamespace(get_object=get_object))
            except StorageAway:
                threading.Event().wait(0.01)
        raise AssertionError("waited to the end")

    with pytest.raises(UserError, match="not allowed"):
        s3_download.download_in_parts(ask, "a", tmp_path / "a")
    assert gave_up == ["a"]
    assert list(tmp_path.iterdir()) == []
