"""A server that is ended and started again on its port: whatever works with storage goes on from there."""

import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_fixtures import COUNT, collect, data, make
from fault_proxy import FaultProxy
from outages import PassingTime, pass_time, use_patience

from cmscale.commands import ending
from cmscale.io import interrupts, patience, s3_upload
from cmscale.io.protocol import StorageAway
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest
from data_prep import verify

PAUSES = 5  # through which the server stays away; at least 0.5 * (0.5 + 1 + 2 + 4 + 6) s


@pytest.fixture
def clock(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> PassingTime:
    """Waits for storage, at the fifth of which the server is started again."""
    use_patience(30)
    return pass_time(monkeypatch, lambda number: proxy.back() if number == PAUSES else None)


def waited(clock: PassingTime) -> None:
    """Holds a lower bound on what was waited."""
    assert len(clock.waits) >= PAUSES
    assert all(wait >= min(0.25 * 2**number, 3.0) for number, wait in enumerate(clock.waits[:PAUSES]))


OPERATIONS = {
    "read": lambda storage, path: storage.read("a"),
    "read_if_present": lambda storage, path: storage.read_if_present("a"),
    "write": lambda storage, path: storage.write("b", b"new"),
    "write_if_absent": lambda storage, path: storage.write_if_absent("c", b"new"),
    "upload": lambda storage, path: storage.upload("d", path),
    "download": lambda storage, path: storage.download("a", path.with_name("copy")),
    "list": lambda storage, path: list(storage.list()),
    "delete": lambda storage, path: storage.delete("a"),
    "check_writable": lambda storage, path: storage.check_writable("e"),
    "abort_uploads": lambda storage, path: storage.abort_uploads(lambda key: True),
}


def test_every_operation_waits(s3: str, proxy: FaultProxy, clock: PassingTime, tmp_path: Path) -> None:
    storage = open_storage(s3)
    storage.write("a", b"old")
    (tmp_path / "file").write_bytes(b"data")
    for name, operation in OPERATIONS.items():
        proxy.away()
        clock.waits.clear()
        operation(storage, tmp_path / "file")
        assert not proxy.is_away, name
        waited(clock)


WAYS = (
    *("reset", "answer 500 InternalError", "answer 502 BadGateway", "answer 503 SlowDown"),
    *("answer 503 ServiceUnavailable", "answer 504 GatewayTimeout", "answer 429 TooManyRequests"),
    "answer 400 RequestTimeout",
)


def test_every_way_of_not_answering_is_waited_for(s3: str, proxy: FaultProxy, monkeypatch) -> None:
    use_patience(30)
    clock = pass_time(monkeypatch, lambda number: proxy.clear() if number == PAUSES else None)
    storage = open_storage(s3)
    storage.write("a", b"old")
    for way in WAYS:
        rule = proxy.add(way)
        clock.waits.clear()
        assert storage.read("a") == b"old"
        assert rule.used >= PAUSES, way
        waited(clock)


def test_a_host_that_has_no_address_is_waited_for(s3: str, proxy: FaultProxy, monkeypatch) -> None:
    import socket

    use_patience(30)
    resolve = socket.getaddrinfo
    clock = pass_time(
        monkeypatch, lambda number: monkeypatch.setattr(socket, "getaddrinfo", resolve) if number == PAUSES else None
    )
    storage = open_storage(s3)
    storage.write("a", b"old")
    storage = open_storage(s3)  # whose connection is new

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert storage.read("a") == b"old"
    waited(clock)


def test_a_server_that_stays_away_is_one_line_after_the_patience(s3: str, proxy: FaultProxy, monkeypatch) -> None:
    clock = pass_time(monkeypatch)
    use_patience(30)
    proxy.away()
    began = clock.monotonic()
    with pytest.raises(StorageAway, match=r"^s3://[^\n]*does not answer[^\n]*; waited 30 minutes[^\n]*$"):
        open_storage(s3).read("a")
    assert clock.monotonic() - began >= 1799
    assert max(clock.waits) >= 15


def test_an_upload_in_parts_goes_on_with_the_part_that_failed(
    s3: str, proxy: FaultProxy, clock: PassingTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_upload, "_THREADS", 1)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (11 << 12) + b"end")
    ended = threading.Event()
    rule = proxy.add("reset", match="partNumber=2", times=3)
    monkeypatch.setattr(proxy, "fault_of", _ending_at(proxy, rule, ended))
    storage = open_storage(s3)
    storage.upload("large", path)
    waited(clock)
    assert ended.is_set()
    assert storage.read("large") == path.read_bytes()
    sent = [request for request, fault in proxy.log if re.search(r"partNumber=1(&|$)", request) and not fault]
    assert len(sent) == 1


def seconds_until_interrupted(
    action: Callable[[], object], *, is_waiting: Callable[[], bool] = patience.is_waiting
) -> float:
    """Presses Ctrl-C as soon as an action waits for storage. Returns how long the action took."""

    def interrupt() -> None:
        while not is_waiting():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        action()
    interrupter.join()
    return time.monotonic() - began


def test_ctrl_c_ends_a_command_of_which_only_threads_wait_for_storage(
    s3: str, proxy: FaultProxy, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(make(source, f"{s3}/set", "mds"))
    manifest = read_dataset_manifest(storage)
    monkeypatch.setattr(interrupts, "received", [])
    before = signal.signal(signal.SIGINT, ending._interrupt)  # as `end_early_interrupts` does
    use_patience(30)
    monkeypatch.setattr(patience, "pause_seconds", lambda *_, **__: 200.0)
    proxy.add("503", match="GET .*shard")
    try:
        assert seconds_until_interrupted(lambda: verify.verify(storage, manifest, workers=2)) < 100
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_upload_in_parts_ends_at_once_and_leaves_no_part(
    s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_patience(30)
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(patience, "pause_seconds", lambda *_, **__: 200.0)
    path = tmp_path / "large"
    path.write_bytes(bytes(11 << 20))
    proxy.add("503", match="partNumber=2")
    storage = open_storage(s3)
    assert seconds_until_interrupted(lambda: storage.upload("large", path)) < 100
    assert storage.abort_uploads(lambda key: True) == 0
    assert list(storage.list()) == []


@pytest.mark.parametrize("hangs", ["PUT .*partNumber", "uploadId"])
def test_ctrl_c_ends_an_upload_to_a_server_that_takes_requests_and_says_nothing(
    s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    use_patience(30)
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    path = tmp_path / "large"
    path.write_bytes(bytes(11 << 20))
    rule, storage = proxy.add("stall", match=hangs), open_storage(s3)
    monkeypatch.setattr(interrupts, "received", [])
    before = signal.signal(signal.SIGINT, ending._interrupt)
    try:
        took = seconds_until_interrupted(lambda: storage.upload("large", path), is_waiting=lambda: rule.used >= 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert took < 40  # one request takes three minutes, if nothing ends it
    monkeypatch.setattr(interrupts, "received", [])
    proxy.clear()
    assert storage.abort_uploads(lambda key: True) == int(hangs == "uploadId")  # nobody could tell that server more
    assert list(storage.list()) == []


def _ending_at(proxy: FaultProxy, rule, ended: threading.Event):
    """Ends the server when a request comes to which the rule applies for the last time."""
    plain = proxy.fault_of

    def fault_of(request: str) -> str:
        fault = plain(request)
        if rule.used == rule.times and not ended.is_set():
            ended.set()
            proxy.away()
        return fault

    return fault_of


@pytest.mark.parametrize("at", ["PUT .*owner", "PUT .*shard.00002", "PUT .*/manifest.json"])
def test_prepare_goes_on(
    source: Path, sets: dict[str, str], s3: str, proxy: FaultProxy, clock, monkeypatch, at
) -> None:
    rule = proxy.add("reset", match=at, times=1)
    monkeypatch.setattr(proxy, "fault_of", _ending_at(proxy, rule, threading.Event()))
    url = make(source, f"{s3}/set", "mds")
    waited(clock)
    storage, local = open_storage(url), open_storage(sets["mds"])
    assert {e.key: storage.read(e.key) for e in storage.list()} == {e.key: local.read(e.key) for e in local.list()}


def test_verify_goes_on(source: Path, s3: str, proxy: FaultProxy, clock: PassingTime, monkeypatch) -> None:
    url = make(source, f"{s3}/set", "mds")
    rule = proxy.add("reset", match="GET .*shard.00003", times=1)
    monkeypatch.setattr(proxy, "fault_of", _ending_at(proxy, rule, threading.Event()))
    assert verify.main([url, "--workers", "1"]) == 0
    waited(clock)


def test_the_loader_goes_on(source: Path, sets, s3: str, proxy: FaultProxy, clock, monkeypatch, tmp_path: Path) -> None:
    url = make(source, f"{s3}/set", "mds")
    rule = proxy.add("reset", match="(GET|HEAD) .*shard.00003", times=1)
    monkeypatch.setattr(proxy, "fault_of", _ending_at(proxy, rule, threading.Event()))
    read = {"num_ranks": 1, "batch": COUNT, "start": 0, "steps": 1}
    assert collect(data(url, cache_dir=str(tmp_path)), **read) == collect(data(sets["mds"]), **read)
    waited(clock)
