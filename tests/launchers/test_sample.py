"""The launcher of samples: what it asks for, and what it refuses before a job is queued."""

from pathlib import Path

import pytest
from launch_fixtures import CONFIG

from cmscale.commands.ending import guarded
from cmscale.config.draw_request import DrawRequest
from cmscale.io.place import Place
from cmscale.io.slurm import MaybeTaken, NoAnswer, Refused
from cmscale.runs.folder import RunDir
from cmscale.runs.sample_sets import part_name
from launchers import sample
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.jobs import SAMPLE, JobSpec
from launchers.judge import Attempt
from launchers.submission import Submission


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would have been launched: (request, run)."""
    launched: list[tuple] = []

    class Recorder(LocalMachine):
        def run(self, job: JobSpec, *, wait: bool) -> int:
            assert job.worker == SAMPLE
            launched.append((job.arguments[0], job.run))
            return 0

    monkeypatch.setitem(CLUSTERS, "local", Recorder())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "one" / "checkpoints" / "step-000000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (tmp_path / "runs" / "one" / "config.yaml").write_text(CONFIG.format(data="data"))
    (tmp_path / "photo").touch()
    return launched


def run(*arguments: str) -> int:
    return guarded(sample.main, ["--cluster", "local", *arguments])


def test_a_job_in_the_runs_folder_gets_the_request_with_absolute_places(asked: list, tmp_path: Path) -> None:
    assert run("runs/one", "--samples", "50000", "--out", "x.npz", "--no-clip", "--seeds", "3") == 0
    ((request, where),) = asked
    assert where.root == tmp_path / "runs" / "one"
    assert DrawRequest.model_validate(request).model_dump(mode="json", exclude_unset=True) == request
    assert request["out"] == str(tmp_path / "x.npz")
    assert (request["samples"], request["clip"], request["seeds"], request["device"]) == (50000, False, 3, "cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/one"], "--out"),
        (["runs/one", "--out", "x.png"], "x.png: the file's name must end in .npz, or name a folder"),
        (["runs/one", "--out", "photo"], "photo: is a file; name a folder"),
        (["runs/one", "--out", "x.npz", "--format", "tar"], "--format tar: --out"),
        (["runs/one", "--out", "x.npz", "--checkpoint", "4"], "no checkpoint of step 4"),
        (["runs/one", "--out", "x.npz", "--weights", "ema_0.1"], "--weights ema_0.1: no such weights"),
        (["runs/one", "--out", "x.npz", "--sampling-times", "800"], "800 is outside the model's times"),
        (["runs/one", "--out", "x.npz", "--classes", "1"], "--classes: has no effect on an unconditional model"),
        (["runs/one", "--out", "x.npz", "--noise", "gone.npy"], "gone.npy: no such file"),
        (["runs/one", "--out", "x", "--raw"], "--raw: has no effect on samples in PNG files"),
        (["runs/one", "--out", "/proc/x.npz"], "--out /proc/x.npz: "),
        (["nowhere", "--out", "x.npz"], "nowhere: no run, checkpoint or exported weights there"),
    ],
)
def test_a_mistake_is_one_line_before_the_queue(arguments: list[str], words: str, asked: list, capsys) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert asked == []


def test_starts_are_compared_by_the_parts_that_are_drawn(tmp_path: Path) -> None:
    submission = Submission(RunDir(tmp_path / "run"), "s")
    request = DrawRequest(source=Place("run"), out=Place(str(tmp_path / "x.npz")), seeds=2)
    submission.write_job(SAMPLE, (request.model_dump(mode="json", exclude_unset=True),))
    (tmp_path / "x-seed1.npz.parts").mkdir()
    (tmp_path / "x-seed1.npz.parts" / part_name(0)).touch()
    (attempt,) = submission.record(Attempt("preempted", "", -1))
    assert attempt.measured == attempt.message == "1 parts of samples"
    submission.report("requeued", attempt, why="preempted")
    assert '"sampling_requeued"' in submission.run.events.read_text()


@pytest.mark.parametrize("source", ["runs/one", "s3://bucket/model.safetensors"])
def test_a_job_that_slurm_refuses_leaves_no_new_folder(
    asked: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    class Refusing(LocalMachine):
        def run(self, job: JobSpec, *, wait: bool) -> int:
            raise Refused("Slurm refuses the job: invalid account")

    monkeypatch.setitem(CLUSTERS, "local", Refusing())
    monkeypatch.setattr(sample, "check_source", lambda *_, **__: None)
    monkeypatch.setattr(sample, "check_request", lambda _: None)
    assert run(source, "--samples", "4", "--out", "x") == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]
    assert asked == []


@pytest.mark.parametrize(
    ("error", "by_another", "stays"),
    [(Refused, False, False), (Refused, True, True), (NoAnswer, False, False), (MaybeTaken, False, True)],
)
def test_a_new_folder_stays_where_slurm_may_have_a_job_of_it(
    asked: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Refused],
    by_another: bool,
    stays: bool,
) -> None:
    """Slurm may have taken what it did not answer about, and two commands of one second share a folder."""

    class Refusing(LocalMachine):
        def run(self, job: JobSpec, *, wait: bool) -> int:
            for name in [job.submission, *(["of another command"] if by_another else [])]:
                Submission(job.run, name).write_job(job.worker, job.arguments)
            raise error("sbatch said something")

    monkeypatch.setitem(CLUSTERS, "local", Refusing())
    monkeypatch.setattr(sample, "check_source", lambda *_, **__: None)
    monkeypatch.setattr(sample, "check_request", lambda _: None)
    assert run("s3://bucket/model.safetensors", "--samples", "4", "--out", "x", "--name", "new") == error.status
    assert (tmp_path / "runs" / "new").exists() == stays
