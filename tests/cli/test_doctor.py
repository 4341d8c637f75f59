"""What `cmscale doctor` tries: each thing that fails is a failure with a remedy."""

import base64
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

from cmscale.cli import machine, nodes, services
from cmscale.cli.finding import Finding
from cmscale.errors import UserError

Usage = namedtuple("Usage", "total used free")


def only(found: Iterator[Finding]) -> Finding:
    (finding,) = found
    return finding


def program(folder: Path, name: str, script: str) -> None:
    """A program on the PATH that answers as a script says."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_attention_is_computed_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.attention()).state == "ok"
    monkeypatch.setattr("cmscale.model.attention.attend", lambda q, k, v, kind: q + k + v)
    found = only(machine.attention())
    assert found.state == "failure"
    assert "sdpa is wrong" in found.found


def test_two_members_meet_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = only(machine.gloo())
    assert found.state in ("ok", "warning")
    assert "works" in found.found
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: torch.tensor(3.0))
    with pytest.raises(RuntimeError, match="the sum of ones over 2 members"):
        list(machine.gloo())


def test_a_folder_of_runs_that_a_node_does_not_share_is_a_failure(
    bin_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("CMSCALE_SITE", "")
    report = nodes._SIGN + json.dumps({"node": "n1", "findings": []})
    program(bin_folder, "srun", f"""for sign; do :; done; test -f "$sign" && echo '{report}'; echo "$sign" >&2""")
    assert nodes.doctor_of_nodes(1, runs_dir=tmp_path / "runs") == {"n1": []}
    assert [each.name for each in tmp_path.iterdir()] == ["bin"]
    assert only(nodes.shared(str(bin_folder / "srun"))).state == "ok"
    assert only(nodes.shared(str(tmp_path / "gone"))).state == "failure"
    assert list(nodes.shared(None)) == []


def test_shared_memory_that_takes_no_file_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**where: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    assert only(machine.shared_memory()).found == "/dev/shm: Read-only file system"


@pytest.mark.parametrize(("free", "state"), [(8e9, "ok"), (2e8, "warning"), (1e6, "failure")])
def test_room_for_shared_memory(free: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(free, 0, free))
    found = only(machine.shared_memory())
    assert found.state == state
    assert ("--shm-size" in found.remedy) == (state != "ok")


def test_batches_that_killed_workers_left_in_shared_memory_are_counted(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid, size in ((gone.pid, 5), (os.getpid(), 7)):
        (tmp_path / f"torch_{pid}_12_0").write_bytes(bytes(size))
    (tmp_path / f"sem.{gone.pid}").write_bytes(bytes(9))
    assert machine._left_by_workers(tmp_path) == [5]


@pytest.mark.parametrize(("held", "state"), [(2e7, "ok"), (2e8, "warning")])
def test_much_memory_that_killed_workers_hold_is_a_warning(
    held: float, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(8e9, 0, 8e9))
    monkeypatch.setattr(machine, "_left_by_workers", lambda folder: [int(held / 2)] * 2)
    found = only(machine.shared_memory())
    assert found.state == state
    assert ("0.2 GB held by 2 files of killed data workers" in found.found) == (state == "warning")
    assert ("rm /dev/shm/torch_*" in found.remedy) == (state == "warning")


def test_a_folder_that_can_not_be_written_or_is_full_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.disk("runs", tmp_path / "new", least=1, wanted=2)).state == "ok"
    assert not (tmp_path / "new").exists()
    assert list(tmp_path.iterdir()) == []
    assert only(machine.disk("runs", Path("/proc/x"), least=1, wanted=2)).state == "failure"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(9, 9, 1.5))
    assert only(machine.disk("runs", tmp_path, least=1, wanted=2)).state == "warning"
    assert only(machine.disk("runs", tmp_path, least=2, wanted=2)).state == "failure"


def test_what_is_no_folder_holds_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link", "file/runs"):
        found = only(machine.disk("runs", tmp_path / name, wanted=2))
        assert (found.state, found.found) == ("failure", f"{tmp_path / name.split('/')[0]}: is no folder")
        assert list(machine.locks(tmp_path / name)) == []
    assert list(machine.locks(Path("/proc/x"))) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_locks_that_keep_nobody_apart_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.locks(tmp_path)).state == "ok"
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    assert only(machine.locks(tmp_path)).state == "failure"

    def refuse(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert only(machine.locks(tmp_path)).state == "warning"


def test_slurm_must_answer_and_tells_how_it_preempts(bin_folder: Path) -> None:
    program(bin_folder, "sbatch", "exit 0")
    program(bin_folder, "scontrol", 'echo "Slurmctld(primary) at host is DOWN"')
    assert only(services.slurm()).state == "failure"
    answer = 'if [ "$1" = ping ]; then echo "Slurmctld(primary) at host is UP"; else cat "$0.conf"; fi'
    program(bin_folder, "scontrol", answer)
    for requeue, mode, states in (
        (1, "REQUEUE", ["ok", "ok", "ok"]),
        (0, "GANG,CANCEL", ["ok", "warning", "warning"]),
    ):
        settings = f"JobRequeue              = {requeue}\nPreemptMode             = {mode}\n"
        (bin_folder / "scontrol.conf").write_text(settings)
        assert [each.state for each in services.slurm()] == states


class WandbServer(BaseHTTPRequestHandler):
    """Takes the key of a letter k, does not know x, refuses n, and fails for whoever brings b."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        key = base64.b64decode((self.headers["Authorization"] or "").removeprefix("Basic ")).decode()
        viewer = {"id": "x", "username": "u", "entity": "u", "flags": "{}", "teams": {"edges": []}}
        status, answer = {
            "k": (200, {"data": {"viewer": viewer}}),
            "x": (200, {"data": {"viewer": None}}),
            "n": (401, {"errors": [{"message": "user is not logged in"}]}),
            "b": (502, {"errors": [{"message": "bad gateway"}]}),
        }[key.removeprefix("api:")[0]]
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address HOST:PORT of a server of wandb; nobody is logged in."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("API_KEY", "BASE_URL", "MODE", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), WandbServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


OF_KEYS = """
import json, os, sys
from cmscale.cli import services
for letter in sys.argv[1:]:
    os.environ["WANDB_API_KEY"] = letter * 40
    os.environ["WANDB_HTTP_TIMEOUT"] = "2" if letter == "b" else "60"  # in which it tries again
    (found,) = services.wandb()
    print(json.dumps([found.state, found.found]))
"""


def found_of_keys(letters: str) -> list[tuple[str, str]]:
    """State and text for keys of these letters, in a new process: wandb remembers what it once was told."""
    ran = subprocess.run([sys.executable, "-c", OF_KEYS, *letters], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


def test_a_wandb_key_is_ok_if_the_server_takes_it(wandb_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(services.wandb()).state == "ok"  # without a key runs log offline
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{wandb_server}")
    expected = (
        ("failure", "invalid credentials"),
        ("failure", "user is not logged in"),
        ("warning", "a key, which could not be tried: "),
        ("ok", f"a key, which {wandb_server} takes"),  # last, as wandb asks no more then
    )
    for (state, found), (as_wanted, words) in zip(found_of_keys("xnbk"), expected, strict=True):
        assert (state, words in found) == (as_wanted, True), found
        assert wandb_server in found


def test_a_server_of_wandb_that_takes_no_connection_and_an_address_that_is_none_are_named(
    wandb_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert only(services.wandb()).found.startswith("a key, but 127.0.0.1:9 does not answer (")
    monkeypatch.setenv("WANDB_BASE_URL", "wandb.example.org")
    assert only(services.wandb()).found.startswith("WANDB_BASE_URL: wandb.example.org is no URL of a server")


@pytest.mark.parametrize("where", ["variable", "settings"])
def test_wandbs_own_proxy_reaches_a_server_that_takes_no_connection(
    where: str, wandb_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{where}.invalid")
    assert f"{where}.invalid does not answer" in only(services.wandb()).found
    if where == "variable":
        monkeypatch.setenv("WANDB_HTTP_PROXY", f"http://{wandb_server}")
    else:
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
        (tmp_path / "settings").write_text(f"[default]\nhttp_proxy = http://{wandb_server}\n")
    assert found_of_keys("k") == [("ok", f"a key, which {where}.invalid takes")]


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> Iterator[Finding]:
        raise ImportError("no such\nlibrary")
        yield

    for name in ("devices", "attention", "gloo", "nccl", "weights"):
        monkeypatch.setattr(machine, name, broken)
    for name in ("slurm", "wandb"):
        monkeypatch.setattr(services, name, broken)
    found = list(machine.findings(tmp_path))
    assert [each.found for each in found if each.state == "failure"] == ["ImportError: no such library"] * 7
    assert any(each.what == "processors" for each in found)


def test_nodes_are_asked_by_srun_and_compared(
    bin_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CMSCALE_SITE", "")
    torches = {"n1": "2.14.1", "n2": "2.13.0"}
    lines = []
    for node, version in torches.items():
        findings = [
            Finding("torch", "ok", version),
            Finding("python", "ok", f"3.11 on {node}"),
            Finding("disk", "ok", f"/tmp: {1 + len(lines)} GB free"),
            Finding("wandb", "ok", "0.31"),
            Finding("wandb", "ok", "no key"),
            Finding("attention", "ok", f"sdpa 0.{len(lines)} ms"),
            Finding("s3://b: write", "failure", f"s3://b/probe-{str(len(lines)) * 32}: refused"),
        ]
        lines.append(nodes._SIGN + json.dumps({"node": node, "findings": [vars(each) for each in findings]}))
    (bin_folder / "answers").write_text("noise\n" + "\n".join(lines))
    program(bin_folder, "srun", f'echo "$@" > {bin_folder}/asked; cat {bin_folder}/answers')
    found = nodes.doctor_of_nodes(2, runs_dir=Path("runs"))
    assert list(found) == ["n1", "n2"]
    assert nodes.differing(found) == ["torch"]
    asked = (bin_folder / "asked").read_text()
    assert f"--nodes=2 --ntasks=2 --ntasks-per-node=1 --mem=0 {sys.executable} -m cmscale doctor --of-node" in asked
    program(bin_folder, "srun", f"echo 'srun: error: n3: gone' >&2; cat {bin_folder}/answers")
    with pytest.raises(UserError, match=r"--nodes 3: 2 of 3 nodes answered \(n1, n2\): srun: error: n3: gone"):
        nodes.doctor_of_nodes(3, runs_dir=Path("runs"))
    assert "srun: error: n3: gone" in capfd.readouterr().err
    (bin_folder / "srun").unlink()
    monkeypatch.setenv("PATH", str(bin_folder))
    with pytest.raises(UserError, match="no srun on the PATH"):
        nodes.doctor_of_nodes(2, runs_dir=Path("runs"))


def test_the_command_shows_what_to_do_and_fails_if_something_does(monkeypatch, capsys, tmp_path: Path) -> None:
    found = [Finding("torch", "ok", "2.14"), Finding("disk", "failure", "1 GB free", "make room there")]
    monkeypatch.setattr("cmscale.cli.diagnosis.findings", lambda folder, counts: found)
    monkeypatch.setenv("CMSCALE_SITE", "")
    assert run(monkeypatch, "doctor", tmp_path / "store") == 1
    shown = capsys.readouterr().out
    for words in ("failure", "make room there", f"{tmp_path}/store: write conditionally", "works"):
        assert words in shown
    assert run(monkeypatch, "doctor", "--json") == 1
    assert [each["state"] for each in json.loads(capsys.readouterr().out)][:2] == ["ok", "failure"]
    monkeypatch.setattr("cmscale.cli.diagnosis.findings", lambda folder, counts: found[:1])
    assert run(monkeypatch, "doctor") == 0
    capsys.readouterr()
    assert run(monkeypatch, "doctor", "/proc/nowhere") == 1
    assert "/proc/nowhere" in capsys.readouterr().out


def test_nodes_that_differ_are_shown(monkeypatch, capsys) -> None:
    low = "/tmp: 30 GB free"
    told = {
        "n1": [
            Finding("torch", "ok", "2.14"),
            Finding("GPUs", "ok", "8"),
            Finding("folder", "warning", low, "make room"),
        ],
        "n2": [
            Finding("torch", "ok", "2.13"),
            Finding("GPUs", "ok", "8"),
            Finding("folder", "warning", low, "make room"),
        ],
    }
    monkeypatch.setattr("cmscale.cli.diagnosis.doctor_of_nodes", lambda count, **more: told)
    assert run(monkeypatch, "doctor", "--nodes", 2) == 0
    shown = capsys.readouterr().out
    assert "they differ in: torch" in shown
    assert "GPUs" not in shown
    assert re.search(r"warning +all +folder +/tmp: 30 GB free", shown)
    assert re.search(r"ok +n2 +torch +2.13", shown)
    assert run(monkeypatch, "doctor", "--nodes", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["differing"] == ["torch"]


def test_an_interrupt_ends_srun_and_with_it_its_job(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bin_folder, "srun", "exec sleep 600")
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *command: Any, **how: Any) -> None:
            super().__init__(*command, **how)
            started.append(self)
            assert self.stdout is not None
            monkeypatch.setattr(self, "stdout", Interrupting(self.stdout.close))

    class Interrupting:
        def __init__(self, close: Callable[[], None]) -> None:
            self.close = close

        def __iter__(self) -> Iterator[str]:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        nodes.doctor_of_nodes(2, runs_dir=Path("runs"))
    assert [process.returncode for process in started] == [-signal.SIGTERM]
