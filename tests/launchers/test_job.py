"""What each rank gets: its place, ports, threads, signals that come early; and the batch script around the ranks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_fixtures import CHECKOUT, placement
from submitit import SlurmExecutor
from submitit.core.core import PicklingExecutor

from cmscale.config import Restart, Slurm
from cmscale.errors import NoSpace, UserError
from cmscale.io.process import EARLY_SIGNAL
from cmscale.runs.folder import RunDir
from launchers.clusters.slurm import master_port, script_text
from launchers.job import record_job_id, set_rank_environment
from launchers.jobs import TRAIN, JobSpec
from launchers.placement import RankPlace
from launchers.submission import Submission


def test_each_restart_has_another_port_below_the_ephemeral_ones() -> None:
    ports = [master_port(job, restart) for job in ("1", "2", "99999999") for restart in ("0", "1", "2")]
    assert len(set(ports)) == len(ports)
    assert all(10000 <= port < 30000 for port in ports)


def test_a_rank_finds_the_others_by_the_variables_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    place = RankPlace(5, 8, 1, 2, "10.0.0.1", 12345)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "stale")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    set_rank_environment(place)
    assert [os.environ[name] for name in names] == ["5", "8", "1", "2", "10.0.0.1", "12345"]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_threads_are_slurms_cpus_or_a_share_of_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    place = RankPlace(0, 4, 0, 4, "127.0.0.1", 1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    for cpus, threads in (("6", "6"), (None, "2")):
        monkeypatch.setenv("OMP_NUM_THREADS", "")
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", cpus or "")
        set_rank_environment(place)
        assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_before_the_worker_has_handlers_is_passed_on_to_it(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "early_worker.py").write_text(
        "import os, signal\n"
        f"os.kill(os.getpid(), {number.value})\n"  # while the worker is being imported
        "def main():\n"
        f"    print(os.environ[{EARLY_SIGNAL!r}])\n"
        "    return 'preempted'\n"
    )
    submission = Submission(RunDir(tmp_path / "run"), "one")
    submission.write_job("early_worker:main", ())
    ran = run_rank(submission, tmp_path)
    assert (ran.returncode, ran.stdout) == (0, f"{number.name}\n"), ran.stderr
    assert submission.rank_ends("first")[0].end == "preempted"


@pytest.mark.parametrize(
    ("body", "status", "end", "message"),
    [
        ("return 'finished'", 0, "finished", ""),
        ("return 'superseded'", 0, "superseded", ""),
        ("from cmscale.errors import UserError; raise UserError('no such file')", 2, "user_error", "no such file"),
        ("from cmscale.errors import NoSpace; raise NoSpace('no space left')", 1, "no_space", "no space left"),
        ("raise RuntimeError('two\\nlines')", 1, "fault", "RuntimeError: two lines"),
        ("import threading; threading.Thread(target=threading.Event().wait).start(); 1 / 0", 1, "fault", "Zero"),
        ("import threading; threading.Thread(target=threading.Event().wait).start(); return 'finished'", 0, "f", ""),
        (
            "from cmscale.errors import NotExported; raise NotExported('step 3\\nis not there')",
            0,
            "not_exported",
            "3 is",
        ),
        ("return 'done'", 1, "running", ""),
    ],
)
def test_a_rank_reports_how_it_ended_and_ends(body: str, status: int, end: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "some_worker.py").write_text(f"def main():\n    {body}\n")
    submission = Submission(RunDir(tmp_path / "run"), "one")
    submission.write_job("some_worker:main", ())
    ran = run_rank(submission, tmp_path)
    assert ran.returncode == status, ran.stderr
    (reported,) = submission.rank_ends("first")
    assert reported.end.startswith(end)
    assert message in reported.message
    assert ("Traceback" in ran.stderr) == (status == 1 and end != "no_space")


def test_a_job_whose_launcher_got_no_answer_records_its_own_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_worker.py").write_text("def main():\n    return 'finished'\n")
    submission = Submission(RunDir(tmp_path / "run"), "one")
    submission.write_job("some_worker:main", ())
    submission.script.touch()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert run_rank(submission, tmp_path).returncode == 0
    assert submission.read_job().job_id == "17"


def test_a_rank_that_can_not_record_its_jobs_id_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise NoSpace("no space left")

    submission = Submission(RunDir(tmp_path / "run"), "one")
    submission.write_job("some_worker:main", ())
    submission.script.touch()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(Submission, "_write_json", full)
    record_job_id(submission, submission.read_job())
    assert submission.read_job().job_id is None


def test_a_damaged_job_is_a_users_mistake_that_names_the_file(tmp_path: Path) -> None:
    submission = Submission(RunDir(tmp_path / "run"), "one")
    submission.write_job("some_worker:main", ())
    submission.job_file.write_bytes(submission.job_file.read_bytes()[:10])
    ran = run_rank(submission, tmp_path)
    assert ran.returncode == 2
    assert f"error: {submission.job_file}: missing or damaged" in ran.stderr
    assert submission.rank_ends("first")[0].end == "user_error"


def run_rank(submission: Submission, folder: Path) -> subprocess.CompletedProcess[str]:
    """The only rank of a job on this machine."""
    command = [sys.executable, "-m", "launchers.job", "local", str(submission.run.root), submission.name, "first"]
    places = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "MASTER_PORT": "1"}
    environment = {**os.environ, **places, "PYTHONPATH": f"{CHECKOUT}:{folder}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


class TestScript:
    def script(self, root: Path, **changed: object) -> str:
        return script_text(JobSpec(TRAIN, (), RunDir(root), placement(**changed), submission="one"))

    def test_it_has_the_settings_of_the_config(self, tmp_path: Path) -> None:
        settings = Slurm(account="team", constraint="h100", mem_gb=100, cpus_per_task=6)
        restart = Restart(signal_seconds=30, max_restarts=2)
        where = {"nodes": 3, "ranks_per_node": 4, "gpus": True, "partition": "gpu"}
        script = self.script(tmp_path / "a run", **where, slurm=settings, restart=restart)
        for flag in (
            "account=team",
            "constraint=h100",
            "mem=100GB",
            "cpus-per-task=6",
            "signal=USR2@30",
            "partition=gpu",
            "nodes=3",
            "ntasks-per-node=4",
            "gpus-per-node=4",
            "time=60",
        ):
            assert f"#SBATCH --{flag}\n" in script
        assert "#SBATCH --requeue\n" in script
        assert "qos" not in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)

    def test_all_memory_and_the_default_partition_without_gpus_by_default(self, tmp_path: Path) -> None:
        script = self.script(tmp_path)
        assert "#SBATCH --mem=0\n" in script
        assert "partition" not in script
        assert "gpus" not in script

    def test_ranks_run_under_srun_that_ends_all_when_one_fails_and_then_the_epilogue(self, tmp_path: Path) -> None:
        root = tmp_path / "a run"
        lines = self.script(root, restart=Restart(signal_seconds=30, max_restarts=2)).splitlines()
        (ranks,) = (line for line in lines if line.startswith("srun"))
        assert " -K1 --cpus-per-task=8 " in ranks
        assert ranks.endswith(f"-u -m launchers.job slurm '{root}' one \"$start\"")
        assert f"--output '{root}/logs/%j_%t_log.out'" in ranks
        (epilogue,) = (line for line in lines if "launchers.clusters.slurm_epilogue" in line)
        assert epilogue == lines[-1]
        assert epilogue.endswith(
            f"slurm_epilogue '{root}' one \"$start\" --status $status "
            "--max-restarts 2 --backoff-seconds 10 --signal-seconds 30"
        )
        order = [lines.index(line) for line in (ranks, "status=$?", epilogue)]
        assert order == sorted(order)
        assert any(line.startswith("trap : TERM") for line in lines[: order[0]])
        assert f"#SBATCH --output='{root}/logs/%j_batch.log'" in lines

    def test_everything_that_a_site_says_is_in_it_and_bash_reads_it(self, tmp_path: Path) -> None:
        settings = Slurm(
            account="team",
            comment="it's #1",
            wckey="project",
            mem_per_gpu="80G",
            cpus_per_task=None,
            extra={"switches": "1@10:00", "spread-job": True},
            srun_args=("--container-image=/a b.sqsh", "--mpi=pmix"),
            setup=("module() { :; }", "module load cuda", "export FOO='a b'"),
            python="python3.12",
        )
        script = self.script(tmp_path, gpus=True, gpu_type="a100", ranks_per_node=4, slurm=settings)
        for line in (
            "#SBATCH --account=team",
            "#SBATCH --comment='it'\"'\"'s #1'",
            "#SBATCH --gpus-per-node=a100:4",
            "#SBATCH --mem-per-gpu=80G",
            "#SBATCH --spread-job",
            "#SBATCH --switches=1@10:00",
            "#SBATCH --wckey=project",
            "module load cuda",
        ):
            assert f"{line}\n" in script
        assert "cpus-per-task" not in script
        assert "--mem=" not in script
        lines = script.splitlines()
        (ranks,) = (line for line in lines if line.startswith("srun"))
        assert " -K1 '--container-image=/a b.sqsh' --mpi=pmix python3.12 -P -u -m launchers.job slurm " in ranks
        assert lines[-1].startswith(f"{sys.executable} -P -m launchers.clusters.slurm_epilogue")  # not in the container
        assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if "PYTHONPATH" in line)
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "wckey" not in self.script(tmp_path)

    def test_the_epilogue_is_not_ended_by_the_signal_after_a_requeue(self, tmp_path: Path) -> None:
        lines = self.script(tmp_path).splitlines()
        (ignores,) = (number for number, line in enumerate(lines) if line.startswith("trap '' TERM"))
        assert lines.index("status=$?") < ignores < len(lines) - 1

    def test_a_folder_whose_name_slurm_would_change_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"100%j/run: Slurm replaces what follows a % in the paths of logs"):
            self.script(tmp_path / "100%j" / "run")

    def test_each_start_has_a_name_of_its_own(self, tmp_path: Path) -> None:
        (line,) = re.findall(r"^start=.*$", self.script(tmp_path), re.MULTILINE)
        for restarts, name in (({}, "7.0"), ({"SLURM_RESTART_COUNT": "2"}, "7.2")):
            environment = {"SLURM_JOB_ID": "7", **restarts}
            shown = subprocess.run(["bash", "-c", f'{line}; echo "$start"'], env=environment, capture_output=True)
            assert shown.stdout.decode() == f"{name}\n"


def test_a_submitit_without_the_part_that_writes_scripts_is_refused_with_the_tested_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner in (SlurmExecutor, PicklingExecutor):
        monkeypatch.delattr(owner, "_make_submission_file_text")
    with pytest.raises(UserError, match=r"submitit .*_make_submission_file_text.*install submitit==1\.5"):
        script_text(JobSpec(TRAIN, (), RunDir(tmp_path), placement()))
