"""What a cluster does to real training: preemption, time limits, scancel, killed ranks, lost nodes, no memory.

Every run that trains comes to its end in one way or another, and then equals one that nothing happened to.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from slow_worker import AT_THE_START
from test_launching import SUBMISSION, attempts, events, job_id, submit, wait, wait_until
from test_training_on_slurm import ranks_of

from cmscale.config import Restart, Slurm
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from launchers.clusters.slurm import SlurmCluster, wait_for_end
from launchers.jobs import JobSpec
from launchers.submission import Submission, newest_step

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from launch_fixtures import placement
from ranks import run_ranks
from small_runs import STEPS, assert_equal, make_data, make_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def golden(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """An uninterrupted run on two ranks."""
    run = make_run(tmp_path_factory.mktemp("golden") / "run", data, "checkpoint.keep_last=99")
    run_ranks(2, "train_work:to_the_end", str(run.root))
    return run


@pytest.fixture(scope="module")
def golden_of_one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(
        tmp_path_factory.mktemp("golden") / "run", data, "checkpoint.every_steps=5", "checkpoint.keep_last=99"
    )
    run_ranks(1, "train_work:to_the_end", str(run.root))
    return run


def submit_training(
    run: RunDir,
    worker: str,
    *arguments: object,
    nodes: int = 2,
    minutes: int = 60,
    mem_gb: int = 0,
    restart: Restart | None = None,
    submission: str = SUBMISSION,
) -> None:
    """Submits a job of one rank per node."""
    where = placement(
        nodes=nodes,
        partition="low",
        minutes=minutes,
        slurm=Slurm(cpus_per_task=1, mem_gb=mem_gb),
        restart=restart or Restart(signal_seconds=5, backoff_seconds=1),
    )
    job = JobSpec(f"slow_worker:{worker}", (str(run.root), *arguments), run, where, submission=submission)
    assert SlurmCluster().run(job, wait=False) == 0


def resume(run: RunDir) -> int:
    """What `submit.py --resume` does, to the end."""
    submit_training(run, "stay", (), submission="two")
    return wait_for_end(Submission(run, "two"))


def wait_for_stay(run: RunDir, number: int) -> None:
    wait_until(lambda: (run.root / f"staying-{number}").exists(), seconds=120)


def preempt(*, nodes: int) -> None:
    command = ["sbatch", "--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(command, check=True, capture_output=True)


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True)


def process_of(file: Path) -> int:
    return int(file.read_text())


def restart_daemon(folder: Path, name: str, command: list[str]) -> None:
    """Starts a daemon of the testbed anew, for `down.sh` to end."""
    with (folder / "log" / f"{name}.out").open("ab") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    (folder / f"{name}.pid").write_text(f"{daemon.pid}\n")


def logged(run: RunDir) -> list[int]:
    return [record["step"] for record in read_lines(run.metrics)]


def resumed_from(run: RunDir) -> list[int]:
    return [record["step"] for record in read_lines(run.events) if record["event"] == "resumed"]


@dataclass(frozen=True)
class History:
    """What became of a run that was preempted, lost a rank, was cancelled, and was resumed."""

    run: RunDir
    jobs: list[str]
    orphans: list[int]
    saved_when_cancelled: int
    logged_when_cancelled: list[int]
    endings: Sequence[str]
    statuses: list[int]


@pytest.fixture(scope="module")
def history(testbed: Path, data: Path, golden: RunDir, tmp_path_factory: pytest.TempPathFactory) -> History:
    """One run on two nodes through all of it; its last rank stays where the next thing happens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(testbed))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        folder = tmp_path_factory.mktemp("history") / "run"
        patient = "engine.collective_timeout_minutes=5"  # the ranks beside the one that stays wait in a collective
        run = make_run(folder, data, "checkpoint.keep_last=99", patient)
        submit_training(run, "stay", (1, 5, 6))
        wait_for_stay(run, 1)
        jobs = [job_id(run)]
        preempt(nodes=2)
        wait_for_stay(run, 2)
        jobs.append(job_id(run))
        ranks = ranks_of(run)
        os.kill(int((run.root / "staying-2").read_text()), signal.SIGKILL)
        wait_for_stay(run, 3)
        jobs.append(job_id(run))
        orphans = [rank.pid for rank in ranks if rank.is_running()]
        subprocess.run(["scancel", jobs[-1]], check=True)
        statuses = [wait(run)]
        saved, before = newest_step(run), logged(run)
        statuses.append(resume(run))
        return History(run, jobs, orphans, saved, before, attempts(run), statuses)


def test_a_run_through_preemption_a_killed_rank_and_scancel_ends_as_if_nothing_had_happened(
    history: History, golden: RunDir
) -> None:
    # Slurm 24.11 starts a job once more that was preempted and then submitted anew; that start does nothing.
    assert [ending for ending in history.endings if ending != "superseded"] == ["preempted", "fault", "cancelled"]
    assert history.statuses == [1, 0]
    assert_equal(history.run, golden)


def test_a_preempted_job_saves_at_the_boundary_goes_back_by_itself_and_repeats_no_step(history: History) -> None:
    assert history.jobs[1] == history.jobs[0]  # the same job
    assert resumed_from(history.run)[0] == 2  # of the step that the ranks were in
    assert logged(history.run)[:5] == [1, 2, 3, 4, 5]


def test_a_killed_rank_ends_its_job_at_once_and_another_loses_no_more_than_the_interval(history: History) -> None:
    assert history.jobs[2] != history.jobs[1]
    assert history.orphans == []
    assert resumed_from(history.run)[1] == 3  # the newest checkpoint; step 5 was done
    assert logged(history.run)[5:] == [4, 5, 6, 7, 8, 9]
    assert "rank 1 on node2: Killed" in history.run.events.read_text()


def test_a_cancelled_job_saves_within_the_kill_wait_and_does_not_come_back(history: History) -> None:
    assert history.saved_when_cancelled == history.logged_when_cancelled[-1] == 7
    assert resumed_from(history.run)[2] == 7
    assert events(history.run).count("requeued") == 2  # after the preemption and the kill


def test_no_start_of_a_job_needs_a_pickle(history: History) -> None:
    assert list(history.run.root.rglob("*.pkl*")) == []


def test_a_truncated_job_file_is_named_and_not_tried_again(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    nodes = "NodeName=node[1-2]"
    scontrol("update", nodes, "State=DRAIN", "Reason=test")
    try:
        submit(run, total_steps=3, how="well")
        job = Submission(run, SUBMISSION).job_file
        job.write_bytes(job.read_bytes()[:20])
    finally:
        scontrol("update", nodes, "State=RESUME")
    assert wait(run) == 2
    assert f"error: {job}: missing or damaged" in capsys.readouterr().err
    assert attempts(run) == ["user_error"]


@pytest.mark.slow
def test_a_node_given_up_with_its_tasks_alive_can_commit_no_more(
    slurm: Path, data: Path, golden_of_one_rank: RunDir, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data, "checkpoint.every_steps=1", "checkpoint.keep_last=99")
    submit_training(run, "wait_for_another_start", nodes=1)
    wait_until(lambda: len(logged(run)) >= 4)
    (rank,) = run.logs.glob("submissions/*/*.0/rank-0000.json")
    node = "node1" if "node1" in rank.read_text() else "node2"
    folder = slurm.parent
    os.kill(process_of(folder / f"slurmd-{node}.pid"), signal.SIGKILL)
    scontrol("update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        assert wait(run) == 0
        told = [record for record in read_lines(run.events) if record["event"] == "checkpoint_failed"]
        assert "start 2 of the run has taken over from start 1; nothing committed" in told[0]["why"]
        assert_equal(run, golden_of_one_rank)
        assert len(list(run.logs.glob("*_batch.log"))) == 1  # the earlier start's script submitted nothing
        wait_until(lambda: "Slurm has started this job again on other nodes" in batch_log(run))
    finally:
        command = f"mount -t tmpfs tmpfs /dev/shm && mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        shell = ["unshare", "--mount", "--propagation", "private", "bash", "-c", f"{command} -f {slurm}"]
        restart_daemon(folder, f"slurmd-{node}", shell)
        wait_until(lambda: subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"]).returncode == 0)


@pytest.mark.slow
def test_a_node_on_which_two_starts_failed_is_left_out_of_the_next(
    slurm: Path, data: Path, golden_of_one_rank: RunDir, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data)
    submit_training(run, "die_on_one_node", nodes=1)
    assert wait(run) == 0
    assert attempts(run) == ["fault", "fault", "finished"]
    assert f"without {(run.root / 'bad-node').read_text()}" in batch_log(run)
    assert_equal(run, golden_of_one_rank)


def batch_log(run: RunDir) -> str:
    return "".join(path.read_text() for path in run.logs.glob("*_batch.log"))


@pytest.mark.slow
def test_a_grace_shorter_than_the_save_leaves_the_checkpoint_before_and_says_so(
    slurm: Path, data: Path, golden_of_one_rank: RunDir, tmp_path: Path
) -> None:
    scontrol("update", "PartitionName=low", "GraceTime=2")
    try:
        run = make_run(tmp_path / "run", data, "checkpoint.every_steps=5", "checkpoint.keep_last=99")
        submit_training(run, "save_slowly_once", nodes=1)
        wait_until(lambda: (run.root / "slow").exists())
        preempt(nodes=2)
        assert wait(run) == 0
    finally:
        scontrol("update", "PartitionName=low", "GraceTime=30")
    (partial,) = [record for record in read_lines(run.events) if record["event"] == "unfinished_save"]
    assert "step-000000005" in partial["why"]
    starts = [record["step"] for record in read_lines(run.events) if record["event"] in ("start", "resumed")]
    assert starts == [0, 0]  # from the checkpoint of step 0
    assert_equal(run, golden_of_one_rank)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_controller_that_is_away_while_a_job_goes_back_is_waited_for(
    slurm: Path, data: Path, golden: RunDir, tmp_path: Path
) -> None:
    run, folder = make_run(tmp_path / "run", data), slurm.parent
    submit_training(run, "stay", (4,))
    wait_for_stay(run, 1)
    os.kill(process_of(folder / "slurmctld.pid"), signal.SIGKILL)
    try:
        for rank in ranks_of(run):  # they leave without Slurm having a hand in it
            rank.send_signal(signal.SIGUSR2)
        wait_until(lambda: attempts(run) == ["preempted"])
        saved = newest_step(run)
        time.sleep(60)
        assert events(run).count("requeued") == 0
    finally:
        restart_daemon(folder, "slurmctld", ["slurmctld", "-D", "-i", "-f", str(slurm)])
    assert wait(run) == 0
    assert attempts(run) == ["preempted", "finished"]
    assert saved == 5
    assert "scontrol requeue" in batch_log(run)  # what was tried in vain
    assert events(run).count("requeued") == 1
    assert logged(run) == list(range(1, STEPS + 1))
    assert_equal(run, golden)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_preemptions_within_five_minutes_limits_spend_no_restart(
    slurm: Path, data: Path, golden: RunDir, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data)
    submit_training(run, "stay", (1, 2, 3, 5, 7), minutes=5, restart=Restart(signal_seconds=5, max_restarts=0))
    for number in range(1, 6):
        wait_for_stay(run, number)
        preempt(nodes=2)
    assert wait(run) == 0
    assert attempts(run) == ["preempted"] * 5 + ["finished"]
    assert logged(run) == list(range(1, STEPS + 1))
    assert_equal(run, golden)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_time_limits_are_saved_and_requeued_and_three_without_a_step_stop_the_run_with_the_reason(
    slurm: Path, data: Path, golden: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", data)
    # Slurm's limits are whole minutes, and it looks every 30 s: the signal comes 40 to 10 s before the end of one.
    restart = Restart(signal_seconds=10, max_restarts=0)
    submit_training(run, "stay", (2, 4, 6, AT_THE_START, AT_THE_START), minutes=1, restart=restart)
    assert wait(run) == 1
    assert capsys.readouterr().err == (
        "stopped: no progress before the time limit, three times; newest checkpoint: step 7; ask for more --time\n"
    )
    assert set(attempts(run)) == {"time_limit"}
    assert set(resumed_from(run)) == {3, 5, 7}
    assert events(run).count("requeued") == len(attempts(run)) - 1 >= 4
    assert "ask for more --time" in run.events.read_text().splitlines()[-1]
    assert resume(run) == 0
    assert logged(run) == list(range(1, STEPS + 1))
    assert_equal(run, golden)


@pytest.fixture
def configured(slurm: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A testbed of its own, with the variable that the test names set."""
    scripts = Path(__file__).resolve().parents[2] / "ops" / "slurm_testbed"
    folder = tmp_path / "testbed"
    environment = {**os.environ, "TESTBED_DIR": str(folder), request.param: "1"}
    del environment["SLURM_CONF"]
    subprocess.run([scripts / "up.sh", "2"], env=environment, check=True, capture_output=True)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield folder
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    subprocess.run([scripts / "down.sh"], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("configured", ["TESTBED_USER_SIGNAL"], indirect=True)
def test_a_preemption_that_brings_the_user_signal_too_saves_once(
    configured: Path, data: Path, golden: RunDir, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data)
    submit_training(run, "stay", (4,))
    wait_for_stay(run, 1)
    preempt(nodes=2)
    assert wait(run) == 0
    assert attempts(run) == ["preempted", "finished"]
    saved = [record["step"] for record in read_lines(run.events) if record["event"] == "checkpoint"]
    assert saved == [0, 3, 5, 6, 9]
    assert logged(run) == list(range(1, STEPS + 1))
    assert_equal(run, golden)


@pytest.mark.slow
@pytest.mark.parametrize("configured", ["TESTBED_MEMORY"], indirect=True)
def test_a_rank_that_takes_more_memory_than_the_job_has_is_named_and_restarts_are_bounded(
    configured: Path, data: Path, golden: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", data)
    submit_training(run, "eat_all_memory", 2, mem_gb=2, restart=Restart(max_restarts=1, backoff_seconds=1))
    assert wait(run) == 1
    said = capsys.readouterr().err
    assert (
        "failed 2 times (restart.max_restarts 1): rank 1 on node2: out of memory; request more with slurm.mem_gb"
        in said
    )
    assert attempts(run) == ["fault", "fault"]
    assert resume(run) == 0
    assert_equal(run, golden)
