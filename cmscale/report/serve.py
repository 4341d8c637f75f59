"""Serves the report of a run over HTTP, built anew whenever the run has written something."""

import hashlib
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cmscale.errors import UserError
from cmscale.report.facts import read_facts
from cmscale.report.page import render_report
from cmscale.runs.folder import RunDir

_PAGE = "/report/index.html"
_TEXT = "text/plain; charset=utf-8"
_KINDS = {".json": "application/json", ".png": "image/png"}
_OFFERED = re.compile(
    r"(config\.yaml|(metrics|events)\.jsonl|provenance\.json|(samples|edits)/[^/]+\.png|evaluations/[^/]+\.json)"
)
"""The files of a run that its page links to; no other is served."""
_PAUSE = 10  # times as long as a page took to build, until it is built again


class ServedReport:
    """The page of a run, as it is now."""

    def __init__(self, run: RunDir, siblings: Sequence[RunDir]) -> None:
        self._run = run
        self._siblings = siblings
        self._lock = threading.Lock()
        self._state = ""
        self._page = b""
        self._next = 0.0

    @property
    def root(self) -> Path:
        """The folder of the run."""
        return self._run.root

    def current(self) -> tuple[str, bytes]:
        """The page and its version; a page that took long to build is kept for a while, whatever is written."""
        with self._lock:
            began = time.monotonic()
            if began < self._next:
                return self._state, self._page
            state = self._written()
            if state != self._state:
                self._page = render_report(self._run, siblings=self._siblings, version=state)
                self._state = state
                ended = time.monotonic()
                self._next = ended + _PAUSE * (ended - began)
            return self._state, self._page

    def _written(self) -> str:
        """What tells apart the states of the files that the page shows."""
        found = hashlib.sha256()
        for run in (self._run, *self._siblings):
            paths = [run.config, run.metrics, run.events, run.samples, run.edits, run.evaluations, run.provenance]
            paths += run.evaluations.glob("*.json")  # a result may replace its own
            for path in paths:
                try:
                    status = path.stat()
                except OSError:
                    continue
                found.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
        found.update(read_facts(self._run, with_metrics=False).state()[0].encode())
        return found.hexdigest()[:16]


def serve(run: RunDir, *, siblings: Sequence[RunDir] = (), host: str = "127.0.0.1", port: int = 0) -> None:
    """Serves the report of a run until the process is interrupted; prints the page's URL first.

    Args:
        host: The address to listen on.
        port: 0 for a free one.

    Raises:
        UserError: nothing can listen there.
    """
    with server_of(ServedReport(run, siblings), host=host, port=port) as server:
        print(address_of(server, host), flush=True)
        server.serve_forever()


def address_of(server: ThreadingHTTPServer, host: str) -> str:
    """The URL of the page."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{server.server_address[1]}{_PAGE}"


def server_of(report: ServedReport, *, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens, but does not answer yet.

    Raises:
        UserError: nothing can listen there.
    """

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    class Handler(_Handler):
        shown = report
        only_here = _is_loopback(host)

    try:
        return Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: can't listen there ({error}); name others") from None


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for the page, its version, and the files that it links to."""

    shown: ServedReport
    only_here: bool
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        try:
            asked = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            path = unquote(urlsplit(self.path).path)
        except ValueError:  # http://[
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        if self.only_here and not _is_loopback(asked):
            self.send_error(HTTPStatus.FORBIDDEN, "not a name of this machine")  # a page elsewhere named itself so
            return
        try:
            self._answer(path)
        except UserError as error:  # the run is gone, or a document of it is damaged for a moment
            self._send(str(error).encode(errors="replace"), _TEXT, HTTPStatus.INTERNAL_SERVER_ERROR)
        except ConnectionError:  # the reader has left
            self.close_connection = True

    def _answer(self, path: str) -> None:
        if path in ("/", "/report", "/report/"):
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", _PAGE)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path == _PAGE:
            self._send(self.shown.current()[1], "text/html; charset=utf-8")
        elif path == "/report/version":
            self._send(self.shown.current()[0].encode(), _TEXT)
        elif _OFFERED.fullmatch(path[1:]) and (content := _read(self.shown.root / path[1:])) is not None:
            self._send(content, _KINDS.get(Path(path).suffix, _TEXT))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a page asks every few seconds."""


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
