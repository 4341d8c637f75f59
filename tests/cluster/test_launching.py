"""Jobs on a real Slurm: ranks, preemption, time limits, cancellation, killed ranks, restarts."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmscale.config import Restart, Slurm
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from launchers.clusters.slurm import SlurmCluster, script_text, wait_for_end
from launchers.evaluate_checkpoints import arguments_for
from launchers.jobs import EVALUATE, JobSpec
from launchers.submission import Submission, read_json

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launch_fixtures import CONFIG, dataset, placement

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
SUBMISSION = "one"


def submit(
    run: RunDir,
    *,
    total_steps: int,
    how: str,
    minutes: int = 60,
    signal_seconds: int = 5,
    settings: Slurm | None = None,
) -> None:
    """Submits a job of two nodes with one rank on each."""
    run.logs.mkdir(parents=True)
    restart, slurm = Restart(signal_seconds=signal_seconds), settings or Slurm(cpus_per_task=2)
    where = placement(nodes=2, partition="low", minutes=minutes, slurm=slurm, restart=restart)
    job = JobSpec("cluster_worker:main", (str(run.root), total_steps, how), run, where, submission=SUBMISSION)
    assert SlurmCluster().run(job, wait=False) == 0


def wait(run: RunDir) -> int:
    """Waits for the end of the job. Returns its exit status."""
    return wait_for_end(Submission(run, SUBMISSION))


def wait_until(condition: Callable[[], object], *, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.1)


def job_id(run: RunDir) -> str:
    return (read_json(run.logs / "submissions" / SUBMISSION / "job.json") or {})["job_id"]


def attempts(run: RunDir) -> list[str]:
    """How the starts of the job ended, in order."""
    file = run.logs / "submissions" / SUBMISSION / "attempts.jsonl"
    return [json.loads(line)["ending"] for line in file.read_text().splitlines()] if file.exists() else []


def events(run: RunDir) -> list[str]:
    return [json.loads(line)["event"] for line in run.events.read_text().splitlines()] if run.events.exists() else []


def steps(run: RunDir) -> list[int]:
    """The steps that were run, in order; each was seen by both ranks."""
    file = run.root / "steps.txt"
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    assert all(seen == "2" for _, seen in lines)
    return [int(step) for step, _ in lines]


def facts(run: RunDir, rank: int) -> dict[str, str]:
    return json.loads((run.root / f"facts-{rank}.json").read_text())


def test_two_nodes_meet_and_each_rank_knows_its_place(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=3, how="well")
    assert wait(run) == 0, capsys.readouterr().err
    assert steps(run) == [1, 2, 3]
    first, second = facts(run, 0), facts(run, 1)
    assert (first["node"], second["node"]) == ("node1", "node2")
    assert (first["RANK"], first["LOCAL_RANK"], first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"]) == (
        "0",
        "0",
        "2",
        "1",
    )
    assert (second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("1", "0", "2")
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (second["MASTER_ADDR"], second["MASTER_PORT"])
    assert attempts(run) == ["finished"]


def test_users_mistake_ends_the_job_with_2_and_is_not_tried_again(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=3, how="user_error")
    assert wait(run) == 2
    assert capsys.readouterr().err == "error: train.seed: got -1; it should be at least 0\n"
    assert attempts(run) == ["user_error"]


def test_preemption_while_ranks_are_starting_is_no_fault(slurm: Path, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=3, how="slow")
    wait_until(lambda: list((run.logs / "submissions" / SUBMISSION).glob("*.0/rank-0000.json")))
    assert not (run.root / "facts-0.json").exists()
    higher = [
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    subprocess.run(higher, check=True, capture_output=True)
    assert wait(run) == 0
    assert steps(run) == [1, 2, 3]
    assert "fault" not in attempts(run)


@pytest.mark.timeout(600)  # each start of it may take a minute
def test_time_limit_saves_and_requeues_and_repeats_no_step(slurm: Path, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    # Slurm's limits are whole minutes: the signal comes 50 s before the end of one, too short for 400 slow steps.
    submit(run, total_steps=400, how="slow at first", minutes=1, signal_seconds=50)
    wait_until(lambda: "requeued" in events(run), seconds=300)
    # On a slow machine a start may be over before it has begun to step; one limit is enough here.
    subprocess.run(["scontrol", "update", f"JobId={job_id(run)}", "TimeLimit=60"], check=True)
    assert wait(run) == 0
    assert steps(run) == list(range(1, 401))
    assert set(attempts(run)[:-1]) == {"time_limit"}
    assert attempts(run)[-1] == "finished"


@pytest.mark.slow
def test_the_same_fault_twice_stops_with_the_reason_and_the_log(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=30, how="fault")
    assert wait(run) == 1
    said = capsys.readouterr().err
    why = "the same failure twice at step 0, so a third start would fail too: RuntimeError: rank 1 is out of luck"
    assert f"fault: {why}" in said
    assert "Traceback" in said
    assert attempts(run) == ["fault"] * 2
    assert events(run) == ["requeued", "fault"]


@pytest.mark.slow
def test_where_slurm_refuses_to_requeue_the_job_goes_on_as_a_new_one_with_what_the_user_told_sbatch(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As JobRequeue=0 answers, and from a shell whose variables would change the job."""
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    refuse = 'echo "Requested operation is presently disabled for job $2" >&2; exit 1'
    stub.write_text(f'#!/bin/sh\n[ "$1" = requeue ] && {{ {refuse}; }}\nexec {shutil.which("scontrol")} "$@"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    leaks = {"SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_MEM_PER_CPU": "1", "SLURM_ARRAY_TASK_ID": "3"}
    for name, value in {**leaks, "SLURM_JOB_ID": "9", "SBATCH_EXPORT": "NONE", "SBATCH_ARRAY_INX": "1-2"}.items():
        monkeypatch.setenv(name, value)
    run = RunDir(tmp_path / "run")
    submit(run, total_steps=100, how="slow", settings=Slurm(cpus_per_task=2, account="team", comment='it\'s "mine"'))
    for name in leaks:
        monkeypatch.delenv(name)
    first = job_id(run)
    wait_until(lambda: len(steps(run)) > 3)
    subprocess.run(["scancel", "--signal=USR2", first], check=True)
    wait_until(lambda: job_id(run) != first)
    shown = subprocess.run(
        ["squeue", "-h", "-o", "%P %a %k", "-j", job_id(run)], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == ["low", "team", "it's", '"mine"']
    assert wait(run) == 0
    assert steps(run) == list(range(1, 101))
    assert attempts(run) == ["preempted", "finished"]
    assert events(run) == ["requeued"]


def test_job_that_slurm_refuses_is_one_line(slurm: Path, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    job = JobSpec("cluster_worker:main", (), run, placement(partition="nowhere"))
    with pytest.raises(
        UserError, match=r"Slurm refuses the job: sbatch: error: .*partition.*; --partition names another"
    ):
        SlurmCluster().run(job, wait=False)


def test_slurm_itself_accepts_the_script(slurm: Path, tmp_path: Path):
    where = placement(nodes=2, ranks_per_node=4, partition="low")
    script = script_text(JobSpec("cluster_worker:main", (), RunDir(tmp_path), where))
    ran = subprocess.run(["sbatch", "--test-only"], input=script, text=True, check=True, capture_output=True)
    assert re.search(r"to start at .* using 64 processors on nodes node\[1-2\]", ran.stderr), ran.stderr


def test_evaluations_during_training_are_jobs_of_their_own_that_the_batch_script_requests(slurm: Path, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    text = CONFIG.format(data=dataset(tmp_path / "data"))
    run.config.write_text(text.replace("total_steps: 3", "total_steps: 5") + "slurm: {cpus_per_task: 1}\n")
    where = placement(partition="low", slurm=Slurm(cpus_per_task=1), restart=Restart(signal_seconds=5))
    job = JobSpec("cluster_worker:main", (str(run.root), 5, "well"), run, where, arguments_for(run, where, 2))
    assert SlurmCluster().run(job, wait=True) == 0
    until = time.monotonic() + 120  # the batch script requests them after it has said how training ended
    jobs: list[dict[str, Any]] = []
    while sum("job_id" in job for job in jobs) < 2 and time.monotonic() < until:
        time.sleep(0.2)
        jobs = [read_json(path) or {} for path in run.logs.glob("submissions/*/job.json")]
    assert sorted(job["worker"] for job in jobs) == ["cluster_worker:main", EVALUATE]
    (marker,) = run.asked_evaluation(5).parent.iterdir()
    assert marker.name.startswith(run.asked_evaluation(5).name)
    assert len({job["job_id"] for job in jobs}) == 2


def test_two_testbeds_do_not_clash_and_leave_nothing(slurm: Path, tmp_path: Path):
    folder = tmp_path / "second"
    environment = {**os.environ, "TESTBED_DIR": str(folder)}
    del environment["SLURM_CONF"]
    scripts = Path(__file__).resolve().parents[2] / "ops" / "slurm_testbed"
    for _ in range(2):  # the second call finds it up
        subprocess.run([scripts / "up.sh", "1"], env=environment, check=True, capture_output=True)
    pids = [int(file.read_text()) for file in folder.glob("*.pid") if ".own." not in file.name]
    assert len(pids) == 3
    ran = subprocess.run(
        [
            "srun",
            "-N1",
            sys.executable,
            "-c",
            "import os; print(os.environ['TMPDIR'], os.listdir('/dev/shm'))",
        ],
        env={**environment, "SLURM_CONF": str(folder / "slurm.conf")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [str(folder / "node1" / "tmp"), "[]"]
    subprocess.run([scripts / "down.sh"], env=environment, check=True)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not folder.exists()
    assert "node2" in subprocess.run(["sinfo", "-h", "-N"], capture_output=True, text=True, check=True).stdout
