"""The choice of a cluster, placements, refusals of a run that is running, and a third cluster in one file."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_cluster
from launch_fixtures import CHECKOUT, CONFIG, dataset, placement, placement_request, starts

from cmscale.config import Restart
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from launchers import heartbeat, submit
from launchers.clusters import CLUSTERS, place, slurm_waiting
from launchers.clusters.slurm_waiting import wait_for_end
from launchers.heartbeat import SILENT_SECONDS, machine_id
from launchers.jobs import EVALUATE, TRAIN, JobSpec
from launchers.run_folders import only_launcher
from launchers.submission import Submission


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The third cluster, registered first."""
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT}:{Path(toy_cluster.__file__).parent}")
    before = dict(CLUSTERS)
    CLUSTERS.clear()
    toy_cluster.register()
    CLUSTERS.update(before)
    yield
    del CLUSTERS["toy"]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, without Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder


def install(commands: Path, name: str, lines: str = "") -> None:
    file = commands / name
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


class TestChoice:
    def test_auto_is_slurm_where_sbatch_is_and_this_machine_elsewhere(self, commands: Path) -> None:
        assert place("auto", placement_request()).cluster == "local"
        install(commands, "sbatch")
        assert place("auto", placement_request()).cluster == "slurm"
        assert place("local", placement_request()).cluster == "local"

    def test_a_plan_for_several_nodes_can_be_printed_where_there_is_no_slurm(self, commands: Path) -> None:
        assert place("auto", placement_request(nodes=2, dry_run=True)).cluster == "slurm"
        with pytest.raises(UserError, match="--nodes 2: this machine is one node"):
            place("auto", placement_request(nodes=2))
        with pytest.raises(UserError, match="no sbatch on the PATH"):
            place("slurm", placement_request())


class TestPlacement:
    def test_slurm_has_eight_gpus_per_node_and_a_day_by_default(self, commands: Path) -> None:
        install(commands, "sbatch")
        found = place("slurm", placement_request(device="auto"))
        assert (found.ranks_per_node, found.gpus, found.minutes, found.nodes) == (8, True, 1440, 1)
        cpu = place("slurm", placement_request(nodes=3, partition="gpu", minutes=7))
        assert (cpu.ranks_per_node, cpu.gpus, cpu.minutes, cpu.num_ranks, cpu.partition) == (1, False, 7, 3, "gpu")
        assert place("slurm", placement_request(ranks_per_node=4, device="cuda")).ranks_per_node == 4

    @pytest.mark.parametrize(("minutes", "possible"), [(2, False), (3, True)])
    def test_a_time_limit_leaves_time_before_the_signal(self, minutes: int, possible: bool, commands: Path) -> None:
        install(commands, "sbatch")
        request = placement_request(minutes=minutes, restart=Restart(signal_seconds=120))
        if possible:
            assert place("slurm", request).minutes == minutes
        else:
            with pytest.raises(UserError, match=r"--time: 2 minutes .* restart\.signal_seconds 120"):
                place("slurm", request)

    def test_this_machine_has_a_rank_per_gpu_and_no_time_limit(
        self, commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
        found = place("local", placement_request(device="auto"))
        assert (found.ranks_per_node, found.gpus, found.minutes) == (3, True, None)
        assert place("local", placement_request(device="auto", ranks_per_node=2)).ranks_per_node == 2
        cpu = place("local", placement_request(device="cpu", ranks_per_node=16))
        assert (cpu.ranks_per_node, cpu.gpus) == (16, False)
        with pytest.raises(UserError, match="--gpus-per-node 4: this machine has 3 GPUs"):
            place("local", placement_request(device="auto", ranks_per_node=4))

    def test_this_machine_without_a_gpu_computes_on_its_cpu_unless_cuda_is_requested(self, commands: Path) -> None:
        found = place("local", placement_request(device="auto"))
        assert (found.ranks_per_node, found.gpus) == (1, False)
        with pytest.raises(UserError, match=r"engine\.device=cuda: this machine has no CUDA device"):
            place("local", placement_request(device="cuda"))


class TestRefusals:
    """A run is trained by one launcher and one job at a time."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> RunDir:
        run = RunDir(tmp_path / "run")
        run.logs.mkdir(parents=True)
        return run

    def submitted(self, run: RunDir, worker: str = TRAIN) -> Submission:
        submission = Submission(run, "one")
        submission.write_job(worker, (), job_id="7")
        return submission

    def test_a_second_launcher_is_refused_while_the_first_one_runs_and_not_after_it(
        self, run: RunDir, commands: Path
    ) -> None:
        refused = pytest.raises(UserError, match=r"another launcher is running this run: .*\.launcher\.lock")
        with only_launcher(run, TRAIN), refused, only_launcher(run, TRAIN):
            pytest.fail("two launchers at once")
        with only_launcher(run, TRAIN):
            pass

    @pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED"])
    def test_a_job_that_waits_or_runs_is_refused_with_what_to_do(self, state: str, run: RunDir, commands: Path) -> None:
        self.submitted(run)
        install(commands, "squeue", f"echo 7 {state} None")
        refused = pytest.raises(UserError, match=rf"job 7 of this run is {state}; end it first: scancel 7")
        with refused, only_launcher(run, TRAIN):
            pytest.fail("started")

    @pytest.mark.parametrize(
        "answer",
        [
            "echo 7 COMPLETED None",
            "echo 7 CANCELLED None",
            "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        ],
    )
    def test_a_job_that_is_over_is_not(self, answer: str, run: RunDir, commands: Path) -> None:
        self.submitted(run)
        install(commands, "squeue", answer)
        with only_launcher(run, TRAIN):
            pass

    def test_a_job_of_another_user_that_slurm_does_not_show_may_be_alive(
        self, run: RunDir, commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.submitted(run)
        install(commands, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        refused = pytest.raises(UserError, match=r"job 7 .* shows this user no such job, .*'s; .* --take-over")
        with refused, only_launcher(run, TRAIN):
            pytest.fail("started")
        with only_launcher(run, TRAIN, take_over=True):
            pass

    def test_a_job_of_another_user_without_an_id_may_be_alive_too(
        self, run: RunDir, commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submission = Submission(run, "one")
        submission.write_job(TRAIN, ())
        submission.script.touch()
        install(commands, "squeue", "")
        with only_launcher(run, TRAIN):
            pass
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        refused = pytest.raises(UserError, match=r"the job of .*one has not .* shows this user no such job, .* --take")
        with refused, only_launcher(run, TRAIN):
            pytest.fail("started")

    def test_jobs_that_ended_or_evaluate_and_damaged_records_are_passed_over(self, run: RunDir, commands: Path) -> None:
        install(commands, "squeue", "echo 7 RUNNING None")
        submission = self.submitted(run, EVALUATE)
        with only_launcher(run, TRAIN):
            pass
        submission.job_file.write_text('{"worker": "tra')
        with only_launcher(run, TRAIN):
            pass
        self.submitted(run).ending_file.write_text("{}")
        with only_launcher(run, TRAIN):
            pass

    def test_jobs_that_nobody_can_ask_about_are_refused_with_what_to_do(self, run: RunDir, commands: Path) -> None:
        self.submitted(run)
        silent = pytest.raises(UserError, match=r"job 7 .* no squeue on the PATH .* --take-over")
        with silent, only_launcher(run, TRAIN):
            pytest.fail("started")
        install(commands, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
        with pytest.raises(UserError, match=r"job 7 .* Slurm does not answer"), only_launcher(run, TRAIN):
            pytest.fail("started")
        with only_launcher(run, TRAIN, take_over=True):
            pass

    def test_a_launcher_on_another_machine_is_refused_while_it_lives(
        self, run: RunDir, commands: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sign = {"host": "login2", "process": 17, "machine": "another kernel"}
        run.launcher_sign.write_text(json.dumps(sign))
        monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)
        looked = time.sleep
        beats = iter([0, 0, 5])
        monkeypatch.setattr(heartbeat.time, "sleep", lambda s: looked(s) or self.touch(run, next(beats)))
        alive = pytest.raises(UserError, match=r"another launcher .* process 17 on host login2, alive \d+ s ago")
        with alive, only_launcher(run, TRAIN):
            pytest.fail("started")
        assert "waiting up to 60 s for another one" in capsys.readouterr().err
        assert next(beats, None) is None
        monkeypatch.undo()
        with only_launcher(run, TRAIN, take_over=True):
            assert json.loads(run.launcher_sign.read_text())["process"] == os.getpid()
        assert not run.launcher_sign.exists()
        run.launcher_sign.write_text(json.dumps(sign))
        long_ago = time.time() - 2 * SILENT_SECONDS
        os.utime(run.launcher_sign, (long_ago, long_ago))
        with only_launcher(run, TRAIN):
            pass
        run.launcher_sign.write_text(json.dumps(sign | {"machine": machine_id()}))  # the lock tells: it is dead
        with only_launcher(run, TRAIN):
            pass

    def touch(self, run: RunDir, later: float) -> None:
        moment = run.launcher_sign.stat().st_mtime + later
        os.utime(run.launcher_sign, (moment, moment))

    def test_a_sign_that_can_not_be_read_for_a_moment_is_watched_on(
        self, run: RunDir, commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run.launcher_sign.write_text(json.dumps({"host": "login2", "process": 17, "machine": "another kernel"}))
        monkeypatch.setattr(heartbeat.time, "sleep", lambda _: self.touch(run, 5))
        read, failures = heartbeat.read_regular, iter([False, True, False])

        def fail(path: Path) -> bytes:
            if next(failures):
                raise OSError(5, "Input/output error")
            return read(path)

        monkeypatch.setattr(heartbeat, "read_regular", fail)
        alive = pytest.raises(UserError, match="another launcher is running this run")
        with alive, only_launcher(run, TRAIN):
            pytest.fail("started")

    def test_a_copy_of_a_run_that_another_machine_trains_is_not_refused_for_its_fresh_sign(
        self, run: RunDir, commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.05)
        monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.5)
        run.launcher_sign.write_text(json.dumps({"host": "login2", "process": 17, "machine": "another kernel"}))
        with only_launcher(run, TRAIN):
            assert json.loads(run.launcher_sign.read_text())["process"] == os.getpid()

    def test_jobs_that_older_versions_submitted_are_refused_too(self, run: RunDir, commands: Path) -> None:
        install(commands, "squeue", "echo 7 RUNNING None")
        submission = self.submitted(run)
        submission.job_file.write_text(json.dumps({"job_id": "7", "worker": "cmscale.train:main"}))
        with pytest.raises(UserError, match="job 7 of this run is RUNNING"), only_launcher(run, TRAIN):
            pytest.fail("started")


class TestWaiting:
    """What `--wait` sees from a login node."""

    @pytest.fixture
    def submission(self, tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
        run = RunDir(tmp_path / "run")
        run.logs.mkdir(parents=True)
        submission = Submission(run, "one")
        submission.write_job(TRAIN, (), job_id="7")
        monkeypatch.setattr(slurm_waiting, "POLL_SECONDS", 0.0)
        monkeypatch.setattr(slurm_waiting, "REASON_SECONDS", 0.0)
        return submission

    def test_a_job_that_waits_says_why(
        self,
        submission: Submission,
        commands: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        finished = f'echo \'{{"ending": "finished", "why": "", "rank": 0}}\' >{submission.ending_file}'
        looks = f"if [ -e two ]; then {finished}; elif [ -e one ]; then : >two; else : >one; fi"
        monkeypatch.chdir(commands)
        install(commands, "squeue", f"{looks}; echo 7 PENDING DependencyNeverSatisfied")
        assert wait_for_end(submission) == 0
        assert capsys.readouterr().out.count("job 7 waits in the queue: DependencyNeverSatisfied\n") == 1

    def test_a_job_that_failed_and_goes_on_as_another_is_followed_though_its_files_come_late(
        self, submission: Submission, commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As NFS shows a file of another node."""
        looks: list[int] = []

        def listed(_: Path) -> list[str]:
            looks.append(1)
            if len(looks) == 5:
                submission.replace_job_id("8")
            return []

        monkeypatch.setattr(slurm_waiting.os, "listdir", listed)
        done = (
            f'echo \'{{"ending": "finished", "why": "", "rank": 0}}\' >{submission.ending_file}; echo 8 COMPLETED None'
        )
        install(commands, "squeue", f'case "$*" in *"--jobs 7"*) echo 7 FAILED NonZeroExitCode;; *) {done};; esac')
        assert wait_for_end(submission) == 0
        assert len(looks) == 5

    def test_ctrl_c_ends_the_waiting_and_says_how_to_end_the_job(
        self,
        submission: Submission,
        commands: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def press(_: float) -> None:
            raise KeyboardInterrupt

        install(commands, "squeue", "echo 7 RUNNING None")
        monkeypatch.setattr(slurm_waiting.time, "sleep", press)
        assert wait_for_end(submission) == 130
        assert capsys.readouterr().err == "\nno longer waiting; the job goes on; to end it: scancel 7\n"

    def test_how_a_job_ended_is_said_when_the_bar_is_closed(
        self, submission: Submission, commands: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beside a bar, lines are broken at the terminal's width."""
        install(commands, "squeue", "echo 7 COMPLETED None")
        said: list[str] = []
        monkeypatch.setattr(slurm_waiting.Follower, "close", lambda _: said.append("closed"))
        monkeypatch.setattr(slurm_waiting, "show_end", lambda *_, **__: said.append("shown") or 1)
        submission.ending_file.write_text('{"ending": "fault", "why": "x", "rank": 0}')
        assert wait_for_end(submission) == 1
        assert said == ["closed", "shown"]


@pytest.mark.usefixtures("toy")
class TestThirdCluster:
    def job(self, folder: Path, how: str) -> JobSpec:
        run = RunDir(folder)
        run.logs.mkdir(parents=True)
        where = placement("toy", nodes=2, minutes=None)
        return JobSpec("launch_fixtures:worker", (str(folder), how), run, where)

    def test_a_job_runs_there(self, tmp_path: Path) -> None:
        job = self.job(tmp_path / "run", "well")
        assert CLUSTERS["toy"].run(job, wait=True) == 0
        places = [starts(tmp_path / "run", rank)[0][1:] for rank in (0, 1)]
        assert places == [[str(rank), "2", "0", "1", "toys.example", "4242"] for rank in (0, 1)]
        assert json.loads(Submission(job.run, job.submission).ending_file.read_text())["ending"] == "finished"

    def test_a_users_mistake_there_is_one(self, tmp_path: Path) -> None:
        job = self.job(tmp_path / "run", "user_error")
        assert CLUSTERS["toy"].run(job, wait=True) == 2
        assert json.loads(Submission(job.run, job.submission).ending_file.read_text())["why"] == "train.seed: got -1"

    def test_the_command_line_knows_it_and_auto_finds_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        config = tmp_path / "tiny.yaml"
        config.write_text(CONFIG.format(data=dataset(tmp_path / "data")))
        assert submit.main(["--cluster", "toy", "--nodes", "2", "--dry-run", str(config)]) == 0
        printed = capsys.readouterr().out
        assert "2 toys" in printed
        assert printed.endswith("toys would run train\n")
        assert place("auto", placement_request(partition="toys")).cluster == "toy"
        assert submit.guarded(lambda _: submit.main(["--cluster", "toy", "--nodes", "3", str(config)])) == 2

    def test_a_run_that_it_runs_is_refused_by_every_launcher(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path)
        Submission(run, "one").write_job(TRAIN, ())
        with pytest.raises(UserError, match="toys are running this run"), only_launcher(run, TRAIN):
            pytest.fail("started")


def test_every_registered_cluster_is_named_as_it_is_registered() -> None:
    assert {name: cluster.name for name, cluster in CLUSTERS.items()} == {"slurm": "slurm", "local": "local"}
