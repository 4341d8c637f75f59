"""Published weights are taken from torch hub's cache, or fetched whole, once per node, or it is said why not."""

import errno
import fcntl
import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchvision.models import VGG16_Weights

from cmscale.errors import NoSpace, UserError
from cmscale.io import published
from cmscale.io.published import INCEPTION, VGG16, Published, hub_checkpoints, published_file

BODY = b"weights" * 500_000


class Web:
    """A server of one file on the loopback, which notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.body = BODY
        self.cut = 0
        self.says_length = True
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                self.send_response(200)
                if web.says_length:
                    self.send_header("Content-Length", str(len(web.body) + web.cut))
                self.end_headers()
                self.wfile.write(web.body)

            def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def file(self) -> Published:
        digest = hashlib.sha256(BODY).hexdigest()[:8]
        url = f"http://127.0.0.1:{self._server.server_port}/a-{digest}.pth"
        return Published("weights of a test", url, key="some.key")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("CMSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Web()
    yield found
    found.close()


def test_the_files_are_those_of_the_packages() -> None:
    assert INCEPTION.url == URL_INCEPTION_V3
    assert VGG16_Weights.IMAGENET1K_V1.url == VGG16.url
    assert (INCEPTION.sha256_prefix, VGG16.sha256_prefix) == ("6726825d", "397923af")


@pytest.mark.parametrize("variables", [{"TORCH_HOME": "~/t"}, {"XDG_CACHE_HOME": "/somewhere"}, {}])
def test_the_cache_is_torch_hubs(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "TORCH_HUB"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert hub_checkpoints() == Path(torch.hub.get_dir()) / "checkpoints"


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(web: Web) -> None:
    path = published_file(web.file())
    assert path.read_bytes() == BODY
    assert published_file(web.file()) == path
    assert len(web.asked) == 1
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_full_disk_names_the_folder_that_is_written_and_its_variable(web: Web, monkeypatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setattr(published, "follow_umask", full)
    with pytest.raises(NoSpace) as caught:
        published_file(web.file())
    assert str(caught.value) == (
        f"{hub_checkpoints()} on node7: no space left on the device; free some, or let TORCH_HOME name a folder on a "
        "larger disk"
    )


def test_where_the_length_is_unknown_what_has_come_is_shown(web: Web, monkeypatch, capsys) -> None:
    monkeypatch.setattr("cmscale.io.counting.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("cmscale.io.counting.EVERY_SECONDS", 0.0)
    web.says_length = False
    assert published_file(web.file()).read_bytes() == BODY
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"downloading a-\w+\.pth: \d+ MB", line) for line in lines), lines
    assert all(line.endswith("time left unknown") for line in lines[:-1])
    assert " 4 MB in " in lines[-1]  # 3.5, rounded up


def test_one_process_of_a_node_downloads_and_the_others_wait(web: Web, tmp_path: Path, monkeypatch) -> None:
    wanted = web.file()
    download = published._download

    def watched(wanted: Published, path: Path) -> None:
        with (tmp_path / "cache" / f"{wanted.name}.lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        download(wanted, path)

    monkeypatch.setattr(published, "_download", watched)
    with ThreadPoolExecutor() as ranks:
        found = [each.result() for each in [ranks.submit(published_file, wanted) for _ in range(3)]]
    assert len({*found}) == 1
    assert len(web.asked) == 1


def test_what_arrives_cut_or_changed_is_not_kept(web: Web) -> None:
    wanted = web.file()
    for body, cut in ((BODY[:-1] + b"x", 0), (BODY[:1000], 7), (b"", 0)):
        web.body, web.cut = body, cut
        with pytest.raises(UserError, match=r"can't be downloaded from http.*or set some\.key to a copy"):
            published_file(wanted)
        assert list(hub_checkpoints().iterdir()) == []


def test_without_the_internet_the_message_says_how_to_do_without(web: Web) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    missing = replace(web.file(), url=f"http://127.0.0.1:{port}/b-{'0' * 8}.pth")
    with pytest.raises(UserError, match=r"weights of a test: not in .*torch/hub/checkpoints, .* refused.*some\.key"):
        published_file(missing)
