"""Objects are deleted a thousand at a time, singly where a store takes no batches, and what stays is said."""

from typing import Any

import pytest
from fault_proxy import FaultProxy
from outages import pass_time

from cmscale.errors import UserError
from cmscale.io import s3_delete
from cmscale.io.s3 import S3Storage
from cmscale.io.storage import open_storage

KEYS = [f"a b/{number}&<é>" for number in range(7)]


@pytest.fixture
def storage(s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    storage = open_storage(f"{s3}/x")
    assert isinstance(storage, S3Storage)
    for key in (*KEYS, "other"):
        storage.write(key, b"data")
    monkeypatch.setattr(s3_delete, "BATCH", 3)
    del proxy.log[:]
    return storage


def left(storage: S3Storage) -> list[str]:
    return [entry.key for entry in storage.list()]


def test_a_batch_is_one_request_with_an_md5_and_no_newer_checksum(storage: S3Storage, proxy: FaultProxy) -> None:
    sent: list[dict[str, str]] = []
    storage.client.meta.events.register(
        "before-send.s3.DeleteObjects",
        lambda request, **_: sent.append({name.lower(): value for name, value in request.headers.items()}),
    )
    storage.delete_all([*KEYS, "missing"])
    assert [request.split()[0] for request, _ in proxy.log] == ["POST"] * 3
    assert left(storage) == ["other"]
    assert all("content-md5" in headers for headers in sent)
    assert not [name for headers in sent for name in headers if "checksum" in name]
    del proxy.log[:]
    storage.delete_all([])
    assert proxy.log == []


@pytest.mark.parametrize(
    "answer",
    [
        *("501 NotImplemented", "405 MethodNotAllowed", "400 MissingContentMD5", "400 InvalidRequest"),
        *("403 AccessDenied", "404 NoSuchKey", "400 BadDigest"),
    ],
)
def test_a_store_that_refuses_batches_is_asked_for_each(storage: S3Storage, proxy: FaultProxy, answer: str) -> None:
    rule = proxy.add(f"answer {answer}", match="POST .*delete", after=1)
    storage.delete_all(KEYS)
    assert rule.used == 1
    assert [request.split()[0] for request, _ in proxy.log] == ["POST"] * 2 + ["DELETE"] * 4
    assert left(storage) == ["other"]


def answering(storage: S3Storage, monkeypatch: pytest.MonkeyPatch, *errors: dict[str, str]) -> None:
    """Makes answers to batches name these errors, one after the other; their objects are not deleted."""
    waiting, plain = list(errors), storage.client.delete_objects

    def delete_objects(*, Delete: dict[str, Any], **names: Any) -> dict[str, Any]:
        mine = [error for error in waiting if error["Key"] in {each["Key"] for each in Delete["Objects"]}]
        for error in mine:
            waiting.remove(error)
        failed = {error["Key"] for error in mine}
        if others := [each for each in Delete["Objects"] if each["Key"] not in failed]:
            plain(Delete={"Objects": others}, **names)
        return {"Errors": mine}

    monkeypatch.setattr(storage.client, "delete_objects", delete_objects)


def test_what_a_store_could_not_delete_just_now_is_asked_for_again(storage: S3Storage, monkeypatch) -> None:
    clock = pass_time(monkeypatch)
    busy = {"Key": f"x/{KEYS[1]}", "Code": "SlowDown", "Message": "later"}
    answering(storage, monkeypatch, busy, {"Key": f"x/{KEYS[5]}", "Code": "InternalError"})
    storage.delete_all(KEYS)
    assert len(clock.waits) == 2
    assert left(storage) == ["other"]


def test_what_a_store_does_not_delete_is_said_and_the_others_are_gone(storage: S3Storage, monkeypatch) -> None:
    locked = [
        {"Key": f"x/{KEYS[number]}", "Code": "AccessDenied", "Message": "locked until tomorrow"} for number in (1, 5)
    ]
    answering(storage, monkeypatch, *locked, {"Key": f"x/{KEYS[0]}", "Code": "NoSuchKey", "Message": ""})
    monkeypatch.setattr(s3_delete, "BATCH", 2)
    with pytest.raises(UserError, match=r"^2 objects can't be deleted, first s3://.*: AccessDenied locked until tomor"):
        storage.delete_all(KEYS)
    assert left(storage) == [KEYS[0], KEYS[1], KEYS[5], "other"]  # the stand-in leaves what it names
