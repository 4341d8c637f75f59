"""Faults of the cluster itself: lost nodes, a controller that is away, short graces, damaged pickles, no memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launching import SUBMISSION, attempts, events, job_id, steps, submit, wait_until

from cmscale.config import Slurm
from cmscale.metrics_log import read_lines
from cmscale.rundir import RunDir
from launchers.outcome import newest_step
from launchers.plan import Plan
from launchers.slurm import run_slurm, wait_for_end

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from ranks import run_ranks
from small_runs import assert_equal, make_data, make_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(290)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def golden(data: Path, tmp_path: Path) -> RunDir:
    """An uninterrupted run on one rank."""
    run = make_run(tmp_path / "golden", data, "checkpoint.every_steps=5", "checkpoint.keep_last=99")
    run_ranks(1, "train_work:to_the_end", str(run.root))
    return run


def submit_training(run: RunDir, worker: str) -> None:
    plan = Plan("slurm", 1, 1, False, "low", 60, Slurm(cpus_per_task=1, signal_seconds=5, backoff_seconds=1))
    assert run_slurm(worker, (str(run.root),), run=run, plan=plan, submission=SUBMISSION, wait=False) == 0


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


def test_a_truncated_pickle_is_named_and_not_tried_again(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    nodes = "NodeName=node[1-2]"
    scontrol("update", nodes, "State=DRAIN", "Reason=test")
    try:
        submit(run, total_steps=3, how="well")
        pickle = run.logs / f"{job_id(run)}_submitted.pkl"
        pickle.write_bytes(pickle.read_bytes()[:100])
    finally:
        scontrol("update", nodes, "State=RESUME")
    assert wait_for_end(run, SUBMISSION) == 1
    assert f"fault: {pickle}: can't be read" in capsys.readouterr().err
    assert attempts(run) == ["fault"]


@pytest.mark.slow
def test_a_node_given_up_with_its_tasks_alive_can_commit_no_more(
    slurm: Path, data: Path, golden: RunDir, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data, "checkpoint.every_steps=1", "checkpoint.keep_last=99")
    submit_training(run, "slow_worker:wait_for_another_start")
    wait_until(lambda: len(logged(run)) >= 4)
    (rank,) = run.logs.glob("submissions/*/*.0/rank-0000.json")
    node = "node1" if "node1" in rank.read_text() else "node2"
    folder = slurm.parent
    os.kill(process_of(folder / f"slurmd-{node}.pid"), signal.SIGKILL)
    scontrol("update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        assert wait_for_end(run, SUBMISSION) == 0
        told = [record for record in read_lines(run.events) if record["event"] == "checkpoint_failed"]
        assert "start 2 of the run has taken over from start 1; nothing committed" in told[0]["why"]
        assert_equal(run, golden)
        assert len(list(run.logs.glob("*_submitted.pkl"))) == 1  # the old start's script submitted nothing
        wait_until(lambda: "Slurm has started the job again elsewhere" in batch_log(run))
    finally:
        command = f"mount -t tmpfs tmpfs /dev/shm && mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        shell = ["unshare", "--mount", "--propagation", "private", "bash", "-c", f"{command} -f {slurm}"]
        restart_daemon(folder, f"slurmd-{node}", shell)
        wait_until(lambda: subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"]).returncode == 0)


def batch_log(run: RunDir) -> str:
    return "".join(path.read_text() for path in run.logs.glob("*_batch.log"))


@pytest.mark.slow
def test_a_grace_shorter_than_the_save_leaves_the_checkpoint_before_and_says_so(
    slurm: Path, data: Path, golden: RunDir, tmp_path: Path
) -> None:
    scontrol("update", "PartitionName=low", "GraceTime=2")
    try:
        run = make_run(tmp_path / "run", data, "checkpoint.every_steps=5", "checkpoint.keep_last=99")
        submit_training(run, "slow_worker:save_slowly_once")
        wait_until(lambda: (run.root / "slow").exists())
        preempt(nodes=2)
        assert wait_for_end(run, SUBMISSION) == 0
    finally:
        scontrol("update", "PartitionName=low", "GraceTime=30")
    (partial,) = [record for record in read_lines(run.events) if record["event"] == "unfinished_save"]
    assert "step-000000005" in partial["why"]
    starts = [record["step"] for record in read_lines(run.events) if record["event"] in ("start", "resumed")]
    assert starts == [0, 0]  # from the checkpoint of step 0
    assert_equal(run, golden)


@pytest.mark.slow
def test_a_controller_that_is_away_while_a_job_goes_back_is_waited_for(slurm: Path, tmp_path: Path) -> None:
    run, folder = RunDir(tmp_path / "run"), slurm.parent
    submit(run, total_steps=60, how="slow")
    wait_until(lambda: len(steps(run)) >= 5)
    os.kill(process_of(folder / "slurmctld.pid"), signal.SIGKILL)
    try:
        for rank in (0, 1):  # leave, without Slurm having a hand in it
            os.kill(
                int((run.root / f"facts-{rank}.json").read_text().partition('"pid": ')[2].rstrip("}")), signal.SIGUSR2
            )
        wait_until(lambda: attempts(run) == ["preempted"])
        saved = newest_step(run)
        time.sleep(60)
        assert events(run)[:1] == ["requeued"]
    finally:
        restart_daemon(folder, "slurmctld", ["slurmctld", "-D", "-i", "-f", str(slurm)])
    assert wait_for_end(run, SUBMISSION) == 0
    assert attempts(run) == ["preempted", "finished"]
    assert steps(run) == list(range(1, 61))
    assert saved >= 5


@pytest.mark.slow
def test_five_preemptions_spend_no_restart_and_no_time_limit(slurm: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=40, how="slow", minutes=5, slurm=Slurm(cpus_per_task=2, signal_seconds=5, max_restarts=0))
    for number in range(1, 6):
        wait_until(lambda number=number: len(steps(run)) >= 5 * number, seconds=120)
        preempt(nodes=2)
        wait_until(lambda number=number: len(attempts(run)) >= number, seconds=60)
    assert wait_for_end(run, SUBMISSION) == 0
    assert attempts(run) == ["preempted"] * 5 + ["finished"]
    assert steps(run) == list(range(1, 41))


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
def test_a_preemption_that_brings_the_user_signal_too_saves_once(configured: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=30, how="slow")
    wait_until(lambda: len(steps(run)) >= 5)
    preempt(nodes=2)
    assert wait_for_end(run, SUBMISSION) == 0
    assert steps(run) == list(range(1, 31))
    assert attempts(run) == ["preempted", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("configured", ["TESTBED_MEMORY"], indirect=True)
def test_a_rank_that_takes_more_memory_than_the_job_has_is_named_and_restarts_are_bounded(
    configured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=5, how="hungry", slurm=Slurm(cpus_per_task=1, mem_gb=2, max_restarts=1, backoff_seconds=1))
    assert wait_for_end(run, SUBMISSION) == 1
    assert "out of memory; ask for more with slurm.mem_gb" in capsys.readouterr().err
    assert attempts(run) == ["fault", "fault"]
