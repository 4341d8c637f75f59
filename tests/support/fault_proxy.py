"""Runs an HTTP proxy in front of an S3 server that injects faults by rules, over real sockets.

    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.add("503", match="PUT .*manifest", times=2)

The first matching rule that is not used up applies to a request; without one the request is forwarded. A fault
`answer STATUS CODE` answers with any error of S3. `away` and `back` take the server off its port and back onto it.
"""

import http.client
import re
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

FAULTS = {
    "away": "ends the server, as `away` does; with `times=1` until `back`",
    "503": "answers SlowDown without forwarding the request",
    "403": "answers InvalidAccessKeyId without forwarding the request",
    "reset": "reads the request and resets the connection",
    "reset after": "forwards the request, then resets the connection instead of answering",
    "stall": "does not answer until the proxy ends",
    "slow": "sends the body in small pieces with pauses",
    "trickle": "sends the body byte by byte with pauses, until the client has gone",
    "truncate": "announces the whole body, sends half of it and closes",
    "cut": "announces half of the body and sends that",
    "error as object": "answers 200 with the description of an error as the body",
    "corrupt": "flips a bit in the middle of the body",
    "corrupt upload": "flips a bit in the middle of the request's body",
}
_PAUSE_SECONDS = 0.02
_CODES = {"503": "503 SlowDown", "403": "403 InvalidAccessKeyId"}


@dataclass
class Rule:
    """A fault for requests whose `METHOD /path?query` matches; `after` requests pass first, `times` None is always.

    Conditional requests have `if-none-match` at the end, those on behalf of a paying requester `requester`.
    """

    fault: str
    match: str
    times: int | None
    after: int
    used: int = 0

    def takes(self, request: str) -> bool:
        if not re.search(self.match, request):
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is not None and self.used >= self.times:
            return False
        self.used += 1
        return True


@dataclass
class FaultProxy:
    """A proxy on a free loopback port while it is entered.

    Attributes:
        upstream: The real server's URL.
        certificate: Speaks TLS with this file of a certificate and its key.
        refuses_trailers: Takes no bodies with a checksum behind them, as Ceph does.
        log: The requests in order: (`METHOD /path?query`, the fault or an empty string).
    """

    upstream: str
    rules: list[Rule] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    certificate: Path | None = None
    refuses_trailers: bool = False
    is_away: bool = False

    def add(self, fault: str, *, match: str = "", times: int | None = None, after: int = 0) -> Rule:
        """Adds a rule, which counts in `used` how often it was applied."""
        assert fault in FAULTS or fault.startswith("answer "), fault
        self.rules.append(Rule(fault, match, times, after))
        return self.rules[-1]

    def clear(self) -> None:
        """Removes all rules."""
        self.rules.clear()

    def __enter__(self) -> "FaultProxy":
        self._lock = threading.Lock()
        self.ended = threading.Event()
        # Bound but not listening: it refuses connections, and keeps the port while the server is away.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port = self._reserved.getsockname()[1]
        self._listen()
        self.url = f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"
        return self

    def _listen(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def away(self) -> None:
        """Ends the server: its port refuses connections, and those that are open are reset."""
        self.is_away = True
        self._server.shutdown()
        self._server.server_close()

    def back(self) -> None:
        """Starts the server again on the same port; does nothing if it is there."""
        with self._lock:
            if self.is_away:
                self._listen()
                self.is_away = False

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if not self.is_away:
            self._server.shutdown()
            self._server.server_close()
        self._reserved.close()

    def fault_of(self, request: str) -> str:
        """The fault for this request, or an empty string; logs it."""
        with self._lock:
            fault = next((rule.fault for rule in self.rules if rule.takes(request)), "")
            self.log.append((request, fault))
            return fault


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Does nothing, as tests read `FaultProxy.log`."""

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has closed the connection
            super().handle()

    def _serve(self) -> None:
        body = b"".join(self._body())
        if self.proxy.is_away:
            self._reset()
            return
        fault = self.proxy.fault_of(self._request())
        if fault in _CODES or fault.startswith("answer "):
            status, code = _CODES.get(fault, fault.removeprefix("answer ")).split()
            text = f"<Error><Code>{code}</Code><Message>by rule</Message></Error>".encode()
            self._answer(int(status), [("Content-Type", "application/xml")], text)
        elif self.proxy.refuses_trailers and "x-amz-trailer" in self.headers:
            text = b"<Error><Code>MissingContentLength</Code></Error>"
            self._answer(411, [("Content-Type", "application/xml")], text)
        elif fault in ("away", "reset"):
            if fault == "away":
                self.proxy.away()
            self._reset()
        elif fault == "stall":
            self.proxy.ended.wait()
            self.close_connection = True
        else:
            self._forward(_flipped(body) if fault == "corrupt upload" else body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _request(self) -> str:
        conditional = " if-none-match" if "If-None-Match" in self.headers else ""
        paid = " requester" if "x-amz-request-payer" in self.headers else ""
        return f"{self.command} {self.path}{conditional}{paid}"

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _forward(self, body: bytes, fault: str) -> None:
        server = urlsplit(self.proxy.upstream)
        connection = http.client.HTTPConnection(str(server.hostname), server.port, timeout=60)
        dropped = ("transfer-encoding", "content-length", "connection", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        try:
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if fault == "reset after":
            self._reset()
            return
        kept = [(k, v) for k, v in response.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
        if fault == "cut":
            content = content[: len(content) // 2]
        if fault == "error as object":
            content = b"<?xml version='1.0'?>\n<Error><Code>InternalError</Code><Message>by rule</Message></Error>"
        self._answer(response.status, kept, content, fault=fault)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, fault: str = "") -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command == "HEAD":
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "corrupt":
            content = _flipped(content)
        if fault == "truncate":
            content = content[: len(content) // 2]
            self.close_connection = True
        if fault not in ("slow", "trickle"):
            self.wfile.write(content)
            return
        piece = max(1, len(content) // 10) if fault == "slow" else 1
        for at in range(0, len(content), piece):
            self.wfile.write(content[at : at + piece])
            self.proxy.ended.wait(_PAUSE_SECONDS)

    def _reset(self) -> None:
        # with a linger time of zero, closing sends RST instead of FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)
