"""Training on a real Slurm by the command that people type: over two nodes, through a killed job, resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from cmscale.runs.folder import RunDir
from cmscale.runs.log import latest_metrics, read_lines
from data_prep.demo import VIEWS, crops, write_lmdb
from data_prep.prepare import main as prepare

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]
CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_lmdb(folder / "demo_lmdb", crops(VIEWS["flower"], count=100, side=32, seed=0))
    arguments = ["--source", f"lsun:{folder / 'demo_lmdb'}", "--image-size", "16", "--format", "webdataset"]
    assert prepare([*arguments, "--out", str(folder / "set")]) == 0
    return folder / "set"


def command(runs: Path, name: str, data: Path, *more: str) -> list[str]:
    launcher = [sys.executable, str(CHECKOUT / "launchers" / "submit.py"), "--cluster", "slurm", "--nodes", "2"]
    where = ["--gpus-per-node", "1", "--runs-dir", str(runs), "--name", name, "--wait"]
    overrides = [
        f"data.path={data}",
        f"train.total_steps={STEPS}",
        "train.micro_batch_size=8",
        "train.log_every=1",
        "train.sample_every=0",
        "checkpoint.every_steps=5",
        "checkpoint.keep_last=99",
        "data.workers=0",
        "slurm.cpus_per_task=1",
        "restart.max_restarts=0",
    ]
    return [*launcher, *where, str(CHECKOUT / "configs" / "demo_ct.yaml"), *overrides, *more]


def ranks_of(run: RunDir) -> list[psutil.Process]:
    """The ranks' processes of a run, wherever Slurm started them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if (
            "python" in Path(line[0] if line else "").name
            and "launchers.job" in line
            and any(str(run.root) in part for part in line)
        ):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_job_over_two_nodes_trains_and_after_kill_9_resume_continues_exactly(
    slurm: Path, data: Path, tmp_path: Path
) -> None:
    whole = subprocess.run(command(tmp_path, "whole", data), capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert whole.stdout.splitlines()[-1] == f"run: {tmp_path / 'whole'}"
    golden, run = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    assert {yaml.safe_load(golden.config.read_text())["method"]["kind"], len(latest_metrics(golden))} == {"ict", STEPS}

    with subprocess.Popen(command(tmp_path, "killed", data), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        until = time.monotonic() + 240
        while not any(record["step"] >= 8 for record in read_lines(run.metrics)):
            assert time.monotonic() < until, "training never came to step 8"
            assert job.poll() is None, "the job ended by itself"
            time.sleep(0.02)
        victims = ranks_of(run)
        assert len(victims) == 2
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        told = job.communicate(timeout=240)[0].decode()
    assert job.returncode == 1, told
    assert latest_metrics(run)[-1]["step"] < STEPS

    resume = [sys.executable, str(CHECKOUT / "launchers" / "submit.py"), "--cluster", "slurm", "--nodes", "2"]
    again = subprocess.run(
        [*resume, "--gpus-per-node", "1", "--wait", "--resume", str(run.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert [record["loss"] for record in latest_metrics(run)] == [record["loss"] for record in latest_metrics(golden)]
    ends = [
        {path.name: path.read_bytes() for path in sorted(each.checkpoint(STEPS).glob("rank-*"))}
        for each in (golden, run)
    ]
    assert ends[0] == ends[1]
