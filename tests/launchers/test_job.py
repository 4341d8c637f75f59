"""Jobs: what a rank is told, how a start is judged, what follows; and whole jobs on this machine."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launch_fixtures import CHECKOUT, CONFIG

from cmscale.cli import main as cli
from cmscale.config import Restart, Slurm
from cmscale.report.facts import read_facts
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines, write_event
from launchers import evaluate, restart
from launchers.job import slurm_port
from launchers.outcome import (
    ATTEMPT,
    SUBMISSION,
    Attempt,
    RankEnd,
    begin_submission,
    decide,
    how_to_go_on,
    judge,
    newest_step,
    record_attempt,
    write_rank_end,
)
from launchers.plan import Plan
from launchers.restart import _own_words, damaged_pickle, first_bad_rank, killed_rank, leaving, superseded
from launchers.slurm import script_text

FAULT = Attempt("fault", "boom", 10, 1, "node2")


def at(step: int, *, node: str = "node2") -> Attempt:
    return Attempt("fault", "boom", step, 1, node)


class TestDecision:
    def test_finished_is_done_and_a_users_mistake_stops_at_once(self):
        assert decide([FAULT, Attempt("finished", "", 20)], max_restarts=0).action == "done"
        stopped = decide([Attempt("user_error", "no such file", 0)], max_restarts=10)
        assert (stopped.action, stopped.why) == ("stop", "no such file")

    def test_preemptions_spend_no_restart(self):
        assert decide([Attempt("preempted", "", 10)] * 50, max_restarts=0).action == "requeue"

    def test_third_fault_without_progress_stops(self):
        assert [decide([FAULT] * n, max_restarts=10).action for n in (1, 2, 3)] == [
            "restart",
            "restart",
            "stop",
        ]
        assert decide([at(1), at(1), at(2)], max_restarts=10).action == "restart"
        between = [FAULT, Attempt("preempted", "", 10), FAULT, Attempt("preempted", "", 10), FAULT]
        assert decide(between, max_restarts=10).action == "stop"

    def test_restarts_are_bounded_even_with_progress(self):
        assert decide([at(step) for step in range(4)], max_restarts=4).action == "restart"
        assert decide([at(step) for step in range(5)], max_restarts=4).action == "stop"

    def test_backoff_doubles_while_nothing_moves_and_starts_anew_after_progress(self):
        assert [decide([FAULT] * n, max_restarts=10).delay_seconds for n in (1, 2)] == [10, 20]
        assert decide([at(1), at(1), at(2)], max_restarts=10).delay_seconds == 10

    def test_a_node_that_failed_twice_is_excluded_and_one_that_failed_once_is_not(self):
        assert decide([at(1, node="a"), at(2, node="b")], max_restarts=9).exclude == ()
        assert decide([at(1, node="a"), at(2, node="b"), at(3, node="a")], max_restarts=9).exclude == ("a",)

    def test_time_limits_requeue_until_three_bring_no_progress(self):
        limits = [Attempt("time_limit", "", step) for step in (5, 9, 9)]
        assert decide(limits, max_restarts=0).action == "requeue"
        assert decide([*limits, limits[-1]], max_restarts=0).action == "stop"
        assert decide(limits, max_restarts=0, can_requeue=False).action == "stop"

    def test_an_evaluation_goes_on_as_long_as_it_measures_though_no_step_is_trained(self, tmp_path: Path):
        run = RunDir(tmp_path)
        folder = begin_submission(run, "one", worker=evaluate.EVALUATION)
        for number in range(4):
            run.evaluation_progress.joinpath("a set").mkdir(parents=True, exist_ok=True)
            (run.evaluation_progress / "a set" / f"block-{number}.safetensors").touch()
            history = record_attempt(run, folder, Attempt("time_limit", "", 9))
            assert decide(history, max_restarts=0).action == "requeue"
        for action in ("requeue", "stop"):
            history = record_attempt(run, folder, Attempt("time_limit", "", 9))
            assert decide(history, max_restarts=0).action == action
        history = record_attempt(run, folder, Attempt("cancelled", "newest", 9))
        cancelled = decide(history, max_restarts=0, go_on=how_to_go_on(folder))
        assert cancelled.why == "cancelled; 0 sets and 4 blocks of samples; the same command goes on where it was"


class TestJudgement:
    def judged(self, *ends: str, status: int = 0, **other) -> str:
        said = [RankEnd(rank, "node", end) for rank, end in enumerate(ends)]  # pyright: ignore[reportArgumentType]
        return judge(said, **{"status": status, "killed": None, "step": 3, "leaving": None, **other}).ending

    def test_all_ranks_must_have_finished(self):
        assert self.judged("finished", "finished") == "finished"
        assert self.judged("finished", "running") == "fault"
        assert self.judged("finished", "finished", status=1) == "fault"
        assert self.judged() == "fault"

    def test_one_refusal_is_the_users_whatever_the_others_say(self):
        assert self.judged("fault", "user_error", status=2) == "user_error"

    def test_what_ranks_say_while_slurm_ends_the_job_is_no_fault(self):
        assert self.judged("fault", "running", status=143, leaving="preempted") == "preempted"
        assert self.judged("finished", "finished", leaving="preempted") == "finished"

    def test_the_killed_rank_is_named_not_the_peers_that_missed_it(self):
        ends = [RankEnd(0, "node1", "fault", "connection closed by peer"), RankEnd(1, "node2", "running")]
        attempt = judge(ends, status=137, killed=(1, "node2", "Killed"), step=0, leaving=None)
        assert (attempt.rank, attempt.node, attempt.message) == (1, "node2", "rank 1 on node2: Killed")

    def test_the_first_bad_rank_speaks_for_itself(self):
        ends = [
            RankEnd(0, "node1", "fault", "closed by peer"),
            RankEnd(1, "node2", "fault", "ValueError: boom"),
        ]
        attempt = judge(ends, status=1, killed=(1, "node2", "Exited with exit code 1"), step=0, leaving=None)
        assert attempt.message == "ValueError: boom"


class TestSlurmsWords:
    def test_the_first_bad_rank_is_read_from_srun(self):
        words = "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Exited with exit code 1\n"
        assert first_bad_rank(words) == (1, "node2", "Killed")
        assert first_bad_rank("srun: error: gpu-07: tasks 8-15: Exited with exit code 1") == (
            8,
            "gpu-07",
            "Exited with exit code 1",
        )
        assert first_bad_rank("all is well") is None

    @pytest.mark.parametrize(
        ("facts", "expected"),
        [
            ({"JobState": "CANCELLED"}, "cancelled"),
            ({"JobState": "COMPLETING"}, "cancelled"),
            ({"JobState": "TIMEOUT"}, "time_limit"),
            ({"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00"}, "preempted"),
            ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": "2020-01-01T00:00:00"}, "time_limit"),
            ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": "2090-01-01T00:00:00"}, None),
            ({"JobState": "RUNNING", "EndTime": "Unknown"}, None),
            ({}, None),
        ],
    )
    def test_why_a_job_leaves_is_read_from_scontrol(self, facts: dict[str, str], expected: str | None):
        assert leaving(facts, signal_seconds=120) == expected

    @pytest.mark.parametrize(
        "words",
        [
            "srun: error: node2: task 1: Out Of Memory\n",
            "slurmstepd-node2: error: Exceeded job memory limit\nsrun: error: node2: task 1: Killed\n",
            "srun: error: node2: task 1: Killed\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n",
        ],
    )
    def test_memory_that_ran_out_is_named(self, words: str):
        assert first_bad_rank(words) == (1, "node2", "out of memory; ask for more with slurm.mem_gb")

    def test_of_ranks_that_are_killed_together_the_one_that_took_the_memory_is_named(self, tmp_path: Path):
        run = RunDir(tmp_path)
        run.logs.mkdir()
        (run.logs / "7_batch.log").write_text(
            "slurmstepd-node1: error: Exceeded job memory limit\n"
            "srun: error: node1: task 0: Killed\nsrun: error: node2: task 1: Killed\n"
        )
        (run.logs / "7_0_log.out").write_text("slurmstepd-node1: error: *** STEP 7.0 ON node1 CANCELLED ***\n")
        words = "slurmstepd-node2: error: StepId=7.0 exceeded memory limit (3 > 2), being killed\n"
        (run.logs / "7_1_log.out").write_text(words)
        ends = [RankEnd(0, "node1", "running"), RankEnd(1, "node2", "running")]
        assert killed_rank(run, "7", ends) == (1, "node2", "out of memory; ask for more with slurm.mem_gb")
        (run.logs / "7_1_log.out").unlink()
        assert killed_rank(run, "7", ends) == (0, "node1", "out of memory; ask for more with slurm.mem_gb")

    def test_an_older_start_of_a_job_knows_that_it_is_one(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        assert not superseded({"Restarts": "0"})
        assert superseded({"Restarts": "1"})
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert not superseded({"Restarts": "1"})
        assert not superseded({})  # slurmctld is away

    def test_each_start_reads_its_own_words_in_the_log_of_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run = RunDir(tmp_path)
        run.logs.mkdir()
        (run.logs / "7_batch.log").write_text("srun: error: a: task 0: Killed\n7.0: fault; requeue: x\nquiet\n")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert first_bad_rank(_own_words(run, "7")) is None
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        assert first_bad_rank(_own_words(run, "7")) == (0, "a", "Killed")

    def test_a_truncated_pickle_is_named(self, tmp_path: Path):
        run = RunDir(tmp_path)
        run.logs.mkdir()
        (run.logs / "7_submitted.pkl").write_bytes(b"\x80\x05")
        assert f"{run.logs}/7_submitted.pkl" in (damaged_pickle(run, "7") or "")


def test_each_restart_has_another_port_below_the_ephemeral_ones():
    ports = [slurm_port(job, restart) for job in ("1", "2", "99999999") for restart in ("0", "1", "2")]
    assert len(set(ports)) == len(ports)
    assert all(10000 <= port < 30000 for port in ports)


def test_script_passes_slurm_settings_and_runs_the_epilogue_after_srun(tmp_path: Path):
    slurm = Slurm(account="team", constraint="h100", mem_gb=100, cpus_per_task=6)
    plan = Plan("slurm", 3, 4, True, "gpu", 60, slurm, Restart(signal_seconds=30, max_restarts=2))
    script = script_text(RunDir(tmp_path / "a run"), plan, submission="one")
    for flag in (
        "account=team",
        "constraint=h100",
        "mem=100GB",
        "cpus-per-task=6",
        "signal=USR2@30",
        "partition=gpu",
    ):
        assert f"#SBATCH --{flag}\n" in script
    assert "qos" not in script
    assert script.index("srun ") < script.index("launchers.restart") < script.index("--max-restarts 2")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_newest_step_counts_only_checkpoints_with_a_manifest(tmp_path: Path):
    run = RunDir(tmp_path)
    assert newest_step(run) == -1
    for step in (5, 10):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(5) / "manifest.json").write_text("{}")
    assert newest_step(run) == 5


@pytest.mark.parametrize(
    ("worker", "event"), [(evaluate.EVALUATION, "evaluation_fault"), ("cmscale.training.loop:main", "fault")]
)
def test_on_slurm_too_the_end_of_an_evaluation_has_a_name_of_its_own(
    worker: str, event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho JobState=RUNNING Restarts=0\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in (("SLURM_JOB_ID", "7"), (SUBMISSION, "one"), (ATTEMPT, "7.0")):
        monkeypatch.setenv(name, value)
    run = RunDir(tmp_path / "run")
    folder = begin_submission(run, "one", worker=worker)
    write_rank_end(folder / "7.0", RankEnd(0, "node1", "fault", "boom"))
    flags = ["--max-restarts", "0", "--backoff-seconds", "1", "--signal-seconds", "1"]
    monkeypatch.setattr(sys, "argv", ["restart", str(run.root), "--status", "1", *flags])
    assert restart.main() == 1
    (said,) = read_lines(run.events)
    assert said["event"] == event
    assert "boom" in said["why"]
    assert json.loads((folder / "ending.json").read_text())["ending"] == "fault"


def start_job(folder: Path, how: str, *, evaluation: bool = False) -> subprocess.Popen[str]:
    """A launcher of two ranks in a process of its own; with `evaluation` its worker is taken for an evaluation's."""
    code = f"""
        from pathlib import Path
        from cmscale.config import Restart, Slurm
        from cmscale.runs.folder import RunDir
        from launchers import outcome, start
        from launchers.plan import Plan
        if {evaluation}:
            outcome.EVALUATION = "launch_fixtures:worker"
        run = RunDir(Path({str(folder)!r}))
        run.logs.mkdir(parents=True)
        plan = Plan("local", 1, 2, False, None, None, Slurm(), Restart(signal_seconds=5, backoff_seconds=0))
        args = ({str(folder)!r}, {how!r})
        raise SystemExit(start.launch("launch_fixtures:worker", args, run=run, plan=plan, wait=True))
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


def starts(folder: Path, rank: int) -> list[list[str]]:
    file = folder / f"rank-{rank}"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def alive(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


class TestLocalJob:
    """submitit's local executor, our controller, two ranks without torch."""

    def test_ranks_know_their_places_and_the_launcher_exits_with_0(self, tmp_path: Path):
        job = start_job(tmp_path / "run", "well")
        _, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
        (first,), (second,) = starts(tmp_path / "run", 0), starts(tmp_path / "run", 1)
        assert first[1:6] == ["0", "2", "0", "2", "127.0.0.1"]
        assert second[1:6] == ["1", "2", "1", "2", "127.0.0.1"]
        assert first[6] == second[6]

    def test_users_mistake_is_one_line_status_2_and_not_tried_again(self, tmp_path: Path):
        job = start_job(tmp_path / "run", "user_error")
        out, said = job.communicate(timeout=60)
        assert (job.returncode, said) == (2, "error: train.seed: got -1\n")
        assert "Traceback" not in out
        assert len(starts(tmp_path / "run", 0)) == 1

    def test_fault_of_one_rank_ends_all_and_starts_them_again(self, tmp_path: Path):
        job = start_job(tmp_path / "run", "once")
        _, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
        assert "RuntimeError: only the first time; starts again" in said
        assert [len(starts(tmp_path / "run", rank)) for rank in (0, 1)] == [2, 2]
        (event,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
        assert json.loads(event)["event"] == "requeued"

    def test_preempted_ranks_start_again(self, tmp_path: Path):
        job = start_job(tmp_path / "run", "preempted")
        _, said = job.communicate(timeout=60)
        assert job.returncode == 0, said
        assert len(starts(tmp_path / "run", 1)) == 2

    @pytest.mark.parametrize(("how", "why"), [("fault", "RuntimeError: rank 1"), ("killed", "killed by SIGKILL")])
    def test_three_faults_without_progress_stop_with_the_reason_and_the_log(self, how: str, why: str, tmp_path: Path):
        job = start_job(tmp_path / "run", how)
        _, said = job.communicate(timeout=120)
        assert job.returncode == 1
        last = said.splitlines()[-1]
        assert last.startswith("fault: 3 failures without progress")
        assert why in last
        assert "_1_log.out" in last
        assert not any(alive(start[0]) for rank in (0, 1) for start in starts(tmp_path / "run", rank))

    def test_a_failed_evaluation_leaves_its_finished_run_finished(self, tmp_path: Path, monkeypatch, capsys):
        run = RunDir(tmp_path / "run")
        run.root.mkdir()
        run.config.write_text(CONFIG.format(data="data"))
        write_event(run, "finished", step=3, rank=0)
        job = start_job(run.root, "fault", evaluation=True)
        job.communicate(timeout=120)
        assert job.returncode == 1
        names = [event["event"] for event in read_lines(run.events)]
        assert names == ["finished", "evaluation_requeued", "evaluation_requeued", "evaluation_fault"]
        assert read_facts(run).status == "finished"
        monkeypatch.setattr(sys, "argv", ["cmscale", "runs", str(tmp_path)])
        with pytest.raises(SystemExit):
            cli.main()
        assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "finished"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_ending_the_launcher_ends_every_rank(self, number: signal.Signals, tmp_path: Path):
        job = start_job(tmp_path / "run", "forever")
        wait_until(lambda: starts(tmp_path / "run", 0) and starts(tmp_path / "run", 1))
        pids = [starts(tmp_path / "run", rank)[0][0] for rank in (0, 1)]
        job.send_signal(number)
        _, said = job.communicate(timeout=60)
        wait_until(lambda: not any(alive(pid) for pid in pids))
        if number != signal.SIGKILL:
            assert job.returncode == 128 + number
            assert "continue with --resume" in said


def wait_until(condition) -> None:
    """Polls, up to a minute."""
    import time

    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
