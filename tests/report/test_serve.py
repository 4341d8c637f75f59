"""A served report is renewed when its run writes something, and gives away nothing but the page and its files."""

import http.client
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from run_folder import write_run

from cmscale.errors import UserError
from cmscale.io.process import CHECKOUT
from cmscale.report import serve
from cmscale.report.serve import ServedReport, server_of
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = write_run(tmp_path / "a_run", total_steps=20)
    (run.root / "secret.txt").write_text("x")
    (tmp_path / "outside.jsonl").write_text("x")
    return run


@contextmanager
def serving(run: RunDir, *, host: str = "127.0.0.1") -> Iterator[int]:
    """The port at which a report is served."""
    with server_of(ServedReport(run, ()), host=host, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def answer(port: int, path: str, *, method: str = "GET", host: str | None = None) -> tuple[int, bytes, str]:
    """Status, content and type of what is at a path, which is sent as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        response = connection.getresponse()
        return response.status, response.read(), response.headers.get("Content-Type", "")
    finally:
        connection.close()


def test_the_page_and_the_files_that_it_links_to_are_served(run, monkeypatch) -> None:
    monkeypatch.setattr(serve, "_PAUSE", 0)
    with serving(run) as port:
        status, page, kind = answer(port, "/report/index.html")
        assert (status, kind) == (200, "text/html; charset=utf-8")
        version = answer(port, "/report/version")[1].decode()
        assert f'data-version="{version}"' in page.decode()
        assert "connect-src &#39;self&#39;" in page.decode()
        assert answer(port, "/")[0] == 302
        for path in ("config.yaml", "metrics.jsonl", "samples/step-000000010.png"):
            assert answer(port, f"/{path}")[:2] == (200, (run.root / path).read_bytes())
        assert answer(port, "/metrics.jsonl", method="HEAD")[:2] == (200, b"")
        for path in (
            "secret.txt",
            "../outside.jsonl",
            "samples/../secret.txt",
            "samples/%2e%2e/secret.txt",
            "%2e%2e/a",
        ):
            assert answer(port, f"/{path}")[0] == 404, path
        assert answer(port, "/report/index.html", host="elsewhere.example")[0] == 403
        assert answer(port, "/report/index.html", host="[")[0] == 400
        assert answer(port, "/report/index.html", host=f"localhost:{port}")[0] == 200


def test_a_newer_event_makes_a_newer_page_that_is_not_built_without_end(run, monkeypatch) -> None:
    report = ServedReport(run, ())
    monkeypatch.setattr(serve, "_PAUSE", 0)
    first, _ = report.current()
    assert report.current()[0] == first
    append_line(run.events, {"time": 1.79e9 + 60, "event": "fault", "step": 20, "rank": 1, "why": "a new reason"})
    monkeypatch.setattr(serve, "_PAUSE", 1e9)
    second, page = report.current()
    assert second != first
    assert b"a new reason" in page
    append_line(run.events, {"time": 1.79e9 + 61, "event": "resumed", "step": 20, "rank": 0, "why": ""})
    assert report.current()[0] == second  # the last one took so long


def test_a_page_that_can_not_be_built_is_an_answer(run, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise UserError("a_run: not a run <any more>")

    monkeypatch.setattr(serve, "render_report", refuse)
    with serving(run) as port:
        status, content, kind = answer(port, "/report/index.html")
    assert (status, content, kind) == (500, b"a_run: not a run <any more>", "text/plain; charset=utf-8")
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_a_line(run) -> None:
    with serving(run) as port, pytest.raises(UserError, match=f"--port {port}: can't listen there"):
        server_of(ServedReport(run, ()), host="127.0.0.1", port=port)
    with pytest.raises(UserError, match="can't listen there"):
        server_of(ServedReport(run, ()), host="no such host", port=0)


@pytest.mark.long
def test_ctrl_c_ends_a_served_report_with_130(run) -> None:
    command = [sys.executable, "-m", "cmscale", "report", str(run.root), "--serve"]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=120) as response:
            assert b"a_run" in response.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not run.report.exists()
