"""Ends exchanges with S3 servers that go on, but so slowly that they would never be over.

A socket's own timeout begins anew with every byte: a server, or a proxy before it, that sends a byte a minute would
hold a reader for years. And urllib3 gives a whole request body the time for connecting, which no slow line keeps.

This is the one module that uses private parts of botocore: it replaces the classes of a client's connections.
"""

import io
import socket
import time
from typing import TYPE_CHECKING, Any

LEAST_BYTES_PER_SECOND = 4096
"""What an answer brings at least, over each `WINDOW_SECONDS` of waiting for it, unless it ends before."""
WINDOW_SECONDS = 60.0
_POST_WINDOWS = 10  # S3 sends white space while it puts an object together: then this many windows are one
_PIECE_BYTES = 64 << 10  # of a body that is sent; each has the socket's timeout to itself

if TYPE_CHECKING:
    from botocore.awsrequest import AWSHTTPConnection as _Base
else:
    _Base = object


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

    def makefile(self, mode: str, buffering: int | None = None) -> io.RawIOBase | io.BufferedReader:
        raw = _PacedReader(self._socket.makefile(mode, 0), window=WINDOW_SECONDS * self._connection.windows)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return raw if buffering == 0 else io.BufferedReader(raw)

    def sendall(self, data: Any) -> None:
        left = memoryview(data).cast("B")
        while left:
            self._socket.sendall(left[:_PIECE_BYTES])
            left = left[_PIECE_BYTES:]


class _PacedReader(io.RawIOBase):
    """Reads one answer. The time that passes in waiting for bytes counts, not what the caller does between."""

    def __init__(self, raw: Any, *, window: float) -> None:
        self._raw = raw
        self._window = window
        self._waited = 0.0
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        began = time.monotonic()
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
