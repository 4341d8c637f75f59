"""Ends exchanges with S3 servers that go on, but so slowly that they would never be over.

A socket's own timeout begins anew with every byte: a server, or a proxy before it, that sends a byte a minute would
hold a reader for years. And urllib3 gives a whole request body the time for connecting, which no slow line keeps.
Ctrl-C ends the exchanges of other threads than the main one at once, and leaves that a few seconds for all of its own.

This is the one module that uses private parts of botocore: it replaces the classes of a client's connections.
"""

import contextlib
import io
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cmscale.io import interrupts

LEAST_BYTES_PER_SECOND = 4096
"""What an answer brings at least, over each `WINDOW_SECONDS` of waiting for it, unless it ends before."""
WINDOW_SECONDS = 60.0
_POST_WINDOWS = 10  # S3 sends white space while it puts an object together: then this many windows are one
_PIECE_BYTES = 64 << 10  # of a body that is sent; each has the socket's timeout to itself

if TYPE_CHECKING:
    from botocore.awsrequest import AWSHTTPConnection as _Base
else:
    _Base = object


_waited_for: set[socket.socket] = set()  # by a thread of this process, at the moment


class TooSlow(TimeoutError):
    """Raised in a read; urllib3 and botocore make it a time-out of theirs, whose cause it is."""


def keep_pace(client: Any) -> None:
    """Gives a boto3 client that has sent nothing yet connections that end if the server is too slow."""
    from botocore.awsrequest import (
        AWSHTTPConnection,
        AWSHTTPConnectionPool,
        AWSHTTPSConnection,
        AWSHTTPSConnectionPool,
    )

    class Pool(AWSHTTPConnectionPool):
        ConnectionCls = type("Connection", (_Paced, AWSHTTPConnection), {})

    class SecurePool(AWSHTTPSConnectionPool):
        ConnectionCls = type("SecureConnection", (_Paced, AWSHTTPSConnection), {})

    client._endpoint.http_session._pool_classes_by_scheme.update(http=Pool, https=SecurePool)


class _Paced(_Base):
    """Makes a connection's socket keep a pace."""

    windows = 1

    def connect(self) -> None:
        self.timeout: Any = _bounded(self.timeout)
        super().connect()
        self.sock: Any = _PacedSocket(self.sock, self)

    def request(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.windows = _POST_WINDOWS if method == "POST" else 1
        return super().request(method, *args, **kwargs)


class _PacedSocket:
    """A connected socket whose answers keep a pace, and whose bodies are sent in pieces."""

    def __init__(self, connected: socket.socket, connection: _Paced) -> None:
        self._socket = connected
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def settimeout(self, seconds: float | None) -> None:
        self._socket.settimeout(_bounded(seconds))

    def makefile(self, mode: str, buffering: int | None = None) -> io.RawIOBase | io.BufferedReader:
        answer: Any = self._socket.makefile(mode, 0)  # pyright: ignore[reportCallIssue, reportArgumentType]
        raw = _PacedReader(answer, self._socket, window=WINDOW_SECONDS * self._connection.windows)
        return raw if buffering == 0 else io.BufferedReader(raw)

    def sendall(self, data: Any) -> None:
        left = memoryview(data).cast("B")
        while left:
            with _waiting(self._socket):
                self._socket.sendall(left[:_PIECE_BYTES])
            left = left[_PIECE_BYTES:]


class _PacedReader(io.RawIOBase):
    """Reads one answer. The time that passes in waiting for bytes counts, not what the caller does between."""

    def __init__(self, raw: Any, connected: socket.socket, *, window: float) -> None:
        self._raw = raw
        self._socket = connected
        self._window = window
        self._waited = 0.0
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        began = time.monotonic()
        with _waiting(self._socket):
            count = self._raw.readinto(buffer)
        self._waited += time.monotonic() - began
        self._bytes += count or 0
        if self._waited >= self._window:
            if self._bytes < LEAST_BYTES_PER_SECOND * self._waited:
                raise TooSlow(f"{self._bytes} bytes in {self._waited:.0f} s")
            self._waited, self._bytes = 0.0, 0
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


@contextmanager
def _waiting(connected: socket.socket) -> Iterator[None]:
    """Lets Ctrl-C end what the block waits for. Raises TooSlow if it has come already."""
    _waited_for.add(connected)  # before the question: a signal between the two finds it here
    try:
        _bounded(None)
        yield
    finally:
        _waited_for.discard(connected)


def _bounded(seconds: float | None) -> float | None:
    """A time-out, no longer than Ctrl-C leaves this thread. Raises TooSlow if that is nothing."""
    left = interrupts.seconds_left()
    if left == 0.0:
        raise TooSlow("interrupted")
    return seconds if left is None or (isinstance(seconds, float | int) and seconds <= left) else left


def _end_waits() -> None:
    """Ends the exchanges that threads wait for. The main thread, whose handler this is, gets an exception anyway."""
    for connected in tuple(_waited_for):
        with contextlib.suppress(OSError, TypeError):  # TLS within the TLS of a proxy is no socket
            socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS's own would change what its thread uses


interrupts.ending.append(_end_waits)
