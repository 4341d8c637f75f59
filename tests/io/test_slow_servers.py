"""A server that answers, but so slowly that it would never be over, is taken for one that does not answer."""

import io
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_proxy import FaultProxy
from outages import pass_time, use_patience

from cmscale.io import s3_pace
from cmscale.io.protocol import StorageAway
from cmscale.io.s3_pace import LEAST_BYTES_PER_SECOND, WINDOW_SECONDS, TooSlow
from cmscale.io.storage import Storage, open_storage

BODY = bytes(range(256)) * 40


def download(storage: Storage, folder: Path) -> bytes:
    storage.download("a", folder / "a")
    return (folder / "a").read_bytes()


def test_ctrl_c_ends_the_wait_beside_a_connection_that_is_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    with here, there:
        monkeypatch.setattr(s3_pace, "_waited_for", {0: object(), 1: here}.values())
        s3_pace._end_waits()
        assert there.recv(1) == b""


WAYS: dict[str, tuple[Callable[[Storage, Path], Any], Any]] = {
    "GET .*/a": (lambda storage, folder: storage.read("a"), BODY),
    "GET .*/a$": (download, BODY),
    "GET .*list-type": (lambda storage, folder: [entry.key for entry in storage.list()], ["a"]),
}


@pytest.mark.parametrize("match", WAYS)
def test_what_trickles_is_asked_for_again(
    s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match: str, capfd
) -> None:
    way, expected = WAYS[match]
    storage = open_storage(s3)
    storage.write("a", BODY)
    use_patience(600)
    rule = proxy.add("trickle", match=match, times=3)  # of a listing botocore repeats two at once

    def patient_again(_: int) -> None:
        if rule.used == 3:  # a busy machine takes longer for an honest answer
            monkeypatch.setattr(s3_pace, "WINDOW_SECONDS", WINDOW_SECONDS)

    clock = pass_time(monkeypatch, patient_again)
    monkeypatch.setattr(s3_pace, "WINDOW_SECONDS", 0.2)
    assert way(storage, tmp_path) == expected
    assert rule.used == 3
    assert clock.waits
    assert "the S3 server answers too slowly (" in capfd.readouterr().err


def test_what_trickles_for_ever_is_one_line_after_the_patience(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(s3)
    storage.write("a", BODY)
    use_patience(0)
    monkeypatch.setattr(s3_pace, "WINDOW_SECONDS", 0.2)
    proxy.add("trickle", match="GET")
    with pytest.raises(StorageAway, match=r"^s3://[^\n]*answers too slowly \(\d+ bytes in \d+ s\)[^\n]*$"):
        storage.read("a")


class Line:
    """A socket on which each read brings `count` bytes after `seconds`."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds, self.now = count, seconds, 0.0
        self.sent: list[bytes] = []

    def monotonic(self) -> float:
        return self.now

    def makefile(self, mode: str, buffering: int) -> "Line":
        assert (mode, buffering) == ("rb", 0)
        return self

    def readinto(self, buffer: memoryview) -> int:
        self.now += self.seconds
        return min(self.count, len(buffer))

    def sendall(self, data: bytes) -> None:
        self.sent.append(bytes(data))

    def close(self) -> None:
        pass


def opened(monkeypatch: pytest.MonkeyPatch, line: Line, *, windows: int = 1) -> io.RawIOBase:
    monkeypatch.setattr(s3_pace, "time", line)
    return s3_pace._PacedSocket(line, SimpleNamespace(windows=windows)).makefile("rb", 0)  # pyright: ignore[reportArgumentType, reportReturnType]


def exhaust(file: io.RawIOBase) -> None:
    for _ in range(1000):
        file.read(1 << 20)


def test_the_pace_is_counted_over_each_minute_of_waiting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = Line(LEAST_BYTES_PER_SECOND, seconds=1)
    file = opened(monkeypatch, steady)
    for _ in range(500):
        assert file.read(1 << 20)
        steady.now += 1000  # what the caller does with it
    steady.count -= 1
    with pytest.raises(TooSlow, match=r"bytes in 60 s"):
        exhaust(file)


def test_an_object_that_is_put_together_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(1, seconds=10)
    file = opened(monkeypatch, line, windows=10)
    with pytest.raises(TooSlow):
        exhaust(file)
    assert line.now == 10 * WINDOW_SECONDS


def test_a_body_is_sent_in_pieces_each_of_which_has_the_timeout_to_itself() -> None:
    line, body = Line(0, 0), bytes(200_001)
    s3_pace._PacedSocket(line, SimpleNamespace()).sendall(body)  # pyright: ignore[reportArgumentType]
    assert b"".join(line.sent) == body
    assert max(map(len, line.sent)) == 65_536
