"""Whole jobs on this machine: two ranks without torch under the launcher, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_fixtures import CHECKOUT, CONFIG, starts

from cmscale.cli import main as cli
from cmscale.report.facts import read_facts
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines, write_event
from launchers.clusters.local_controller import first_failure
from launchers.submission import Submission, read_json


def start_job(folder: Path, how: str, *, evaluation: bool = False, pause: int = 0) -> subprocess.Popen[str]:
    """A launcher of two ranks. With `evaluation` its worker counts as an evaluation's."""
    code = f"""
        from pathlib import Path
        from launch_fixtures import placement
        from cmscale.config import Restart
        from cmscale.runs.folder import RunDir
        from launchers import jobs, submission
        from launchers.clusters import CLUSTERS
        if {evaluation}:
            submission._BESIDE["launch_fixtures:worker"] = "evaluation"
        run = RunDir(Path({str(folder)!r}))
        run.logs.mkdir(parents=True)
        restart = Restart(signal_seconds=5, backoff_seconds={pause})
        where = placement("local", ranks_per_node=2, minutes=None, restart=restart)
        job = jobs.JobSpec("launch_fixtures:worker", ({str(folder)!r}, {how!r}), run, where)
        raise SystemExit(CLUSTERS["local"].run(job, wait=True))
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support")]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], object]) -> None:
    """Polls, up to a minute."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it did not happen within a minute"
        time.sleep(0.02)


def test_ranks_know_their_places_and_the_launcher_exits_with_0(tmp_path: Path) -> None:
    job = start_job(tmp_path / "run", "well")
    _, printed = job.communicate(timeout=60)
    assert job.returncode == 0, printed
    (first,), (second,) = starts(tmp_path / "run", 0), starts(tmp_path / "run", 1)
    assert first[1:6] == ["0", "2", "0", "2", "127.0.0.1"]
    assert second[1:6] == ["1", "2", "1", "2", "127.0.0.1"]
    assert first[6] == second[6]
    logs = [path.name for path in (tmp_path / "run" / "logs").glob("*_log.out")]
    assert sorted(name.partition("_")[2] for name in logs) == ["0_log.out", "1_log.out"]
    assert list((tmp_path / "run").rglob("*.pkl")) == []


@pytest.mark.parametrize(
    ("how", "status", "line"), [("user_error", 2, "train.seed: got -1"), ("no_space", 1, "no space left")]
)
def test_what_no_restart_would_mend_is_one_line_and_not_tried_again(
    how: str, status: int, line: str, tmp_path: Path
) -> None:
    job = start_job(tmp_path / "run", how)
    out, printed = job.communicate(timeout=60)
    assert (job.returncode, printed) == (status, f"error: {line}\n")
    assert "Traceback" not in out
    assert len(starts(tmp_path / "run", 0)) == 1


@pytest.mark.long
def test_fault_of_one_rank_ends_all_and_starts_them_again(tmp_path: Path) -> None:
    job = start_job(tmp_path / "run", "once")
    _, printed = job.communicate(timeout=60)
    assert job.returncode == 0, printed
    assert "RuntimeError: only the first time; starts again" in printed
    assert [len(starts(tmp_path / "run", rank)) for rank in (0, 1)] == [2, 2]
    (event,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(event)["event"] == "requeued"


@pytest.mark.long
def test_a_run_that_is_moved_while_it_runs_is_not_made_anew_and_its_launcher_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_job(run, "forever")
    wait_until(lambda: starts(run, 0) and starts(run, 1))
    run.rename(tmp_path / "moved")
    job.terminate()
    _, printed = job.communicate(timeout=60)
    assert printed.count("UserError: ") == 1  # the launcher's, which commands print as a line
    assert "gone from" in printed.splitlines()[-1]
    assert not run.exists()


@pytest.mark.long
def test_preempted_ranks_start_again(tmp_path: Path) -> None:
    job = start_job(tmp_path / "run", "preempted")
    _, printed = job.communicate(timeout=60)
    assert job.returncode == 0, printed
    assert len(starts(tmp_path / "run", 1)) == 2


@pytest.mark.long
def test_three_faults_without_progress_stop_with_the_reason_and_the_log(tmp_path: Path) -> None:
    job = start_job(tmp_path / "run", "fault")
    _, printed = job.communicate(timeout=120)
    assert job.returncode == 1
    last = printed.splitlines()[-1]
    assert last.startswith("fault: 3 failures without progress")
    assert "RuntimeError: rank 1" in last
    assert "_1_log.out" in last
    assert not any(alive(start[0]) for rank in (0, 1) for start in starts(tmp_path / "run", rank))


@pytest.mark.long
def test_an_evaluation_that_is_killed_again_and_again_leaves_its_finished_run_finished(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(CONFIG.format(data="data"))
    write_event(run, "finished", step=3, rank=0)
    job = start_job(run.root, "killed", evaluation=True)
    _, printed = job.communicate(timeout=120)
    assert job.returncode == 1
    last = printed.splitlines()[-1]
    assert last.startswith("fault: 3 failures without progress")
    assert "killed by SIGKILL" in last
    assert "_1_log.out" in last
    assert not any(alive(start[0]) for rank in (0, 1) for start in starts(run.root, rank))
    names = [event["event"] for event in read_lines(run.events)]
    assert names == ["finished", "evaluation_requeued", "evaluation_requeued", "evaluation_fault"]
    assert read_facts(run).state()[0] == "finished"
    monkeypatch.setattr(sys, "argv", ["cmscale", "runs", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.long
def test_ending_the_launcher_ends_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    job = start_job(tmp_path / "run", "forever")
    wait_until(lambda: starts(tmp_path / "run", 0) and starts(tmp_path / "run", 1))
    pids = [starts(tmp_path / "run", rank)[0][0] for rank in (0, 1)]
    job.send_signal(number)
    _, printed = job.communicate(timeout=60)
    wait_until(lambda: not any(alive(pid) for pid in pids))
    if number != signal.SIGKILL:
        assert job.returncode == 128 + number
        assert "continue with --resume" in printed
        ending = read_json(next((tmp_path / "run" / "logs" / "submissions").glob("*/ending.json")))
        assert (ending["ending"], "continue with --resume" in ending["why"]) == ("cancelled", True)  # so it is listed


@pytest.mark.long
def test_a_run_that_is_ended_in_the_pause_before_a_restart_is_cancelled(tmp_path: Path) -> None:
    job = start_job(tmp_path / "run", "once", pause=60)
    wait_until(lambda: (tmp_path / "run" / "events.jsonl").exists())  # requeued
    job.terminate()
    _, printed = job.communicate(timeout=60)
    assert (job.returncode, "cancelled before the next start" in printed) == (128 + signal.SIGTERM, True)
    ending = read_json(next((tmp_path / "run" / "logs" / "submissions").glob("*/ending.json")))
    assert ending["ending"] == "cancelled"


def test_of_ranks_that_failed_together_one_that_was_killed_is_to_blame() -> None:
    assert first_failure([None, 0]) is None
    assert first_failure([0, 3, None]) == {"rank": 1, "code": 3}
    assert first_failure([1, None, -9, 2]) == {"rank": 2, "code": -9}


WAITING_WORKER = """
import os, signal, threading
from pathlib import Path

def main(folder, heeds):
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: note(folder, number) if heeds else None)
    Path(folder, "waiting").touch()
    while True:
        signal.pause()

def note(folder, number):
    Path(folder, "signal").write_text(signal.Signals(number).name)
    os._exit(0)
"""


class TestController:
    """Time limits and the grace after SIGTERM, without a launcher."""

    def start(self, folder: Path, *limits: str, heeds: bool) -> tuple[subprocess.Popen[bytes], Submission]:
        (folder / "waiting_worker.py").write_text(WAITING_WORKER)
        submission = Submission(RunDir(folder / "run"), "one")
        submission.write_job("waiting_worker:main", (str(folder), heeds))
        command = [sys.executable, "-m", "launchers.clusters.local_controller", str(submission.run.root)]
        environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{folder}", "MASTER_PORT": "1"}
        process = subprocess.Popen([*command, "one", "first", "--num-ranks", "1", *limits], env=environment)
        return process, submission

    def codes(self, submission: Submission) -> list[int]:
        return (read_json(submission.folder / "first" / "exits.json") or {})["codes"]

    @pytest.mark.long
    def test_ranks_get_the_user_signal_before_the_time_limit(self, tmp_path: Path) -> None:
        limits = ("--grace-seconds", "60", "--time-limit-seconds", "600", "--signal-seconds", "580")
        process, submission = self.start(tmp_path, *limits, heeds=True)
        assert process.wait(timeout=60) == 0
        assert (tmp_path / "signal").read_text() == "SIGUSR2"
        assert self.codes(submission) == [0]

    @pytest.mark.long
    def test_a_rank_that_ignores_it_is_killed_at_the_time_limit(self, tmp_path: Path) -> None:
        limits = ("--grace-seconds", "60", "--time-limit-seconds", "10", "--signal-seconds", "1")
        process, submission = self.start(tmp_path, *limits, heeds=False)
        process.wait(timeout=60)
        assert self.codes(submission) == [-signal.SIGKILL]

    @pytest.mark.parametrize(("heeds", "code"), [(True, 0), (False, -signal.SIGKILL)])
    def test_sigterm_is_passed_on_and_followed_by_sigkill_after_the_grace(
        self, heeds: bool, code: int, tmp_path: Path
    ) -> None:
        grace = "60" if heeds else "0.1"
        limits = ("--grace-seconds", grace, "--time-limit-seconds", "600", "--signal-seconds", "1")
        process, submission = self.start(tmp_path, *limits, heeds=heeds)
        wait_until(lambda: (tmp_path / "waiting").exists())
        process.terminate()
        process.wait(timeout=120)
        assert self.codes(submission) == [code]
        assert (tmp_path / "signal").exists() == heeds
