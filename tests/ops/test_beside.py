"""What `ops/test.sh` runs beside the tests says how it ended, and never outlives them."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "ops" / "beside.sh"


def finished(log: Path, command: str, *, seconds: int = 600) -> subprocess.CompletedProcess[str]:
    lines = ["set -euo pipefail", f"source {BESIDE}", "trap beside_stop EXIT"]
    lines += [f"beside_start {log} bash -c '{command}'"]
    lines += [] if seconds else [f"until [ -s {log} ]; do sleep 0.05; done"]  # until it runs
    lines += [f"beside_finish 'the trial' {seconds}"]
    return subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("echo begun; echo all is well", 0, "== the trial: all is well\n"),
        ("echo begun; echo no index; exit 75", 0, "== the trial: NOT TESTED: no index ("),
        ("echo begun; echo wrong losses; exit 1", 1, "== the trial: FAILED with status 1\nbegun\nwrong losses\n"),
        ("kill -KILL $$", 0, "== the trial: NOT TESTED: ended by a signal ("),
    ],
)
def test_its_end_is_a_line_and_only_a_failure_is_red(tmp_path: Path, command: str, status: int, words: str) -> None:
    done = finished(tmp_path / "log", command)
    assert done.returncode == status, done.stderr
    assert words in done.stdout


def test_it_is_not_waited_for_beyond_its_time(tmp_path: Path) -> None:
    done = finished(tmp_path / "log", "echo $$; exec sleep 1000", seconds=0)
    assert (done.returncode, done.stderr) == (0, "")
    assert "== the trial: NOT TESTED: not done 0 minutes after the start of all checks" in done.stdout
    wait_for_end(int((tmp_path / "log").read_text()))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_checks(tmp_path: Path, ending: signal.Signals) -> None:
    log = tmp_path / "log"
    own = os.getpriority(os.PRIO_PROCESS, 0)
    inner = "bash -c 'sleep 1000 & echo $$ $!; wait'"
    script = f"source {BESIDE}; trap beside_stop EXIT; beside_start {log} {inner}; while true; do sleep 0.1; done"
    checks = subprocess.Popen(["bash", "-c", script], start_new_session=True)
    try:
        while not (log.is_file() and log.read_text().endswith("\n")):
            assert checks.poll() is None
            time.sleep(0.05)
        for process in log.read_text().split():
            assert os.getpriority(os.PRIO_PROCESS, int(process)) >= min(own + 5, 19)
        checks.send_signal(ending)
        checks.wait()
        for process in log.read_text().split():
            wait_for_end(int(process))
    finally:
        os.killpg(checks.pid, signal.SIGKILL) if checks.poll() is None else None


def wait_for_end(process: int) -> None:
    deadline = time.monotonic() + 120
    while is_running(process):
        assert time.monotonic() < deadline, f"process {process} lives"
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends while it is read
        return False
