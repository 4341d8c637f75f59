"""The watchdog: a rank that makes no step is recorded with its stacks and killed, whatever blocks it."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmscale.engine import watch
from cmscale.io.process import START
from cmscale.runs.log import read_lines

HERE = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def ranks() -> Iterator[subprocess.Popen[str]]:
    """A process that forks the watched ranks, so that torch is imported once for all."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", START: "submission/attempt-0"}
    command = [sys.executable, str(HERE / "watched.py")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with a rank that its watch has left alive


def run_watched(ranks: subprocess.Popen[str], how: str, folder: Path, *, minutes: float = 0.01) -> tuple[int, int]:
    """The exit status of the watched process, and the watch's process id."""
    assert ranks.stdin is not None
    assert ranks.stdout is not None
    print(json.dumps([how, str(folder), minutes]), file=ranks.stdin, flush=True)
    assert select.select([ranks.stdout], [], [], 120)[0], "the rank lives, or the process that forks it did not start"
    status, watch = ranks.stdout.readline().split()
    return int(status), int(watch)


def wait_for_end(process: int) -> None:
    """Waits until a process that is not our child is gone (or a zombie)."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 30)[0], "the watch did not end"
    os.close(descriptor)


@pytest.mark.parametrize("how", ["waits", "stopped", "gil"])
@pytest.mark.long
def test_a_rank_that_makes_no_step_is_named_its_stacks_kept_and_killed(
    how: str, ranks: subprocess.Popen[str], tmp_path: Path
) -> None:
    status, watch = run_watched(ranks, how, tmp_path)
    assert status == -9
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["rank"], event["step"]) == ("fault", 3, 2)
    assert event["start"] == "submission/attempt-0"  # by which the launcher finds it
    assert "no step within 0.6 s" in event["why"]
    assert ("was stopped" in event["why"]) == (how == "stopped")
    stacks = (tmp_path / "logs" / "stacks-rank-3.txt").read_text()
    assert "watched.py" in stacks
    assert "in main" in stacks
    assert event["waits_for_others"] is False
    wait_for_end(watch)


@pytest.mark.long
def test_a_rank_that_steps_is_left_alone_and_may_end_the_watch(ranks: subprocess.Popen[str], tmp_path: Path) -> None:
    status, watch = run_watched(ranks, "beats", tmp_path)
    assert status == 0
    assert list(read_lines(tmp_path / "events.jsonl")) == []
    wait_for_end(watch)


@pytest.mark.long
def test_a_rank_that_was_stopped_and_goes_on_is_not_killed_for_it(ranks: subprocess.Popen[str], tmp_path: Path) -> None:
    status, watch = run_watched(ranks, "wakes", tmp_path, minutes=0.02)
    assert status == 0
    assert {event["event"] for event in read_lines(tmp_path / "events.jsonl")} <= {"fault", "recovered"}
    wait_for_end(watch)


def test_the_watch_ends_with_its_rank(ranks: subprocess.Popen[str], tmp_path: Path) -> None:
    status, watch = run_watched(ranks, "dies", tmp_path, minutes=10)
    assert status == -9
    wait_for_end(watch)


def test_a_rank_whose_stacks_can_not_be_read_is_recorded_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(watch, "waits_for_others", fail)
    monkeypatch.setattr(watch, "read_beats", lambda _: None)
    stacks, events = tmp_path / "stacks", tmp_path / "events.jsonl"
    line = f"trap 'echo stacks >{stacks}' USR1; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == b"ready\n"
            watch.end(rank.pid, rank=0, step=4, limit=1, events=str(events), stacks=str(stacks), start="a/7.0")
            assert rank.wait(timeout=30) == -signal.SIGKILL
        finally:
            rank.kill()
    (event,) = read_lines(events)
    assert (event["event"], "waits_for_others" in event) == ("fault", False)
