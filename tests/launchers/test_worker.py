"""The worker under foreign launchers: torchrun on two processes, and the variables of others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from launch_fixtures import CONFIG as TINY
from launch_fixtures import dataset
from outages import SHORT, upload_set
from small_runs import CONFIG, make_data

from cmscale.config import read_config
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from launchers.worker import STOPPED, prepare, rank_variables

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_torchrun_trains_a_run_on_two_processes(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("DATA", str(make_data(tmp_path))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(CHECKOUT / "launchers" / "worker.py"), "--name", "a", "--runs-dir", str(tmp_path), str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [*command, "train.total_steps=2"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("finished") == 2
    run = RunDir(tmp_path / "a")
    events = list(read_lines(run.events))
    assert [event["event"] for event in events][-1] == "finished"
    assert [record["step"] for record in read_lines(run.metrics)] == [1, 2]
    manifest = json.loads((run.checkpoint(2) / "manifest.json").read_text())
    assert manifest["num_ranks"] == 2
    assert not run.launcher_sign.exists()


@pytest.mark.slow
def test_the_other_ranks_wait_with_rank_0_while_storage_does_not_answer_it(
    s3_server: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    """For longer than a collective may take: rank 0 alone looks at the inputs, before the ranks train."""
    config, data = tmp_path / "config.yaml", upload_set(make_data(tmp_path), s3_server, bucket="data-of-torchrun")
    config.write_text(CONFIG.replace("DATA", data))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(CHECKOUT / "launchers" / "worker.py"), "--name", "a", "--runs-dir", str(tmp_path), str(config)]
    command += ["train.total_steps=2", f"data.cache_dir={tmp_path / 'cache'}", *SHORT]
    away = proxy.add("away", match="GET .*manifest", times=1)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        until = time.monotonic() + 300
        while not away.used:
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(30)
        assert not (tmp_path / "a").exists()
        proxy.back()
        printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed
    assert [record["step"] for record in read_lines(RunDir(tmp_path / "a").metrics)] == [1, 2]


def test_the_same_command_continues_a_run_and_another_config_is_refused(tmp_path: Path) -> None:
    config, run = tmp_path / "tiny.yaml", RunDir(tmp_path / "a")
    config.write_text(TINY.format(data=dataset(tmp_path / "data")))
    prepare(run, str(config), [])
    prepare(run, str(config), ["train.micro_batch_size=1"])
    prepare(run, None, [])
    assert read_config(run.config).train.micro_batch_size == 1
    with pytest.raises(UserError, match=r"--resume \S+/a: the config differs .* train\.seed: 0 -> 5"):
        prepare(run, str(config), ["train.seed=5"])
    with pytest.raises(UserError, match="no config given, and there is no run"):
        prepare(RunDir(tmp_path / "b"), None, [])
    with pytest.raises(UserError, match="no such folder"):
        prepare(RunDir(tmp_path / "b"), str(config), ["data.path=nowhere"])
    assert not (tmp_path / "b").exists()


MASTER = {"MASTER_ADDR": "node1"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("0", "1", "0", "1")),
        ({"RANK": "3", "WORLD_SIZE": "4"} | MASTER, ("3", "4", "0", "1")),  # a pod of a PyTorchJob
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | MASTER, ("3", "4", "1", "2")),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            }
            | MASTER,
            ("5", "8", "1", "4"),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"} | MASTER, tuple("2402")),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "2"} | MASTER, tuple("2402")),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"} | MASTER, tuple("2401")),
        (
            {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "8(x2)"}
            | MASTER,
            ("9", "16", "1", "8"),
        ),
    ],
)
def test_ranks_are_found_by_the_variables_of_their_launcher(given: dict[str, str], expected: tuple[str, ...]) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert tuple(rank_variables(given)[name] for name in names) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"} | MASTER, "RANK: got 2; it should be below WORLD_SIZE 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"} | MASTER, "RANK: got 'x'; it should be a whole number"),
    ],
)
def test_variables_that_make_no_sense_are_named(given: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        rank_variables(given)


def test_the_status_of_a_rank_that_saved_and_stopped_is_none_of_the_others() -> None:
    assert STOPPED not in (0, 1, 2)


def test_the_templates_name_files_and_flags_that_exist() -> None:
    for template in ("pytorchjob.yaml", "pbs.sh"):
        text = (CHECKOUT / "ops" / "templates" / template).read_text()
        assert "launchers/worker.py" in text
        assert "--name" in text
    subprocess.run(["bash", "-n", str(CHECKOUT / "ops" / "templates" / "pbs.sh")], check=True)
