"""The launcher's command line: what it prints, what it refuses, what it leaves on disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_fixtures import CHECKOUT, CONFIG, dataset

from cmscale.config import parse_config, read_config
from cmscale.errors import UserError
from cmscale.io.local import LocalStorage
from cmscale.io.place import Place
from cmscale.io.storage import open_storage
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import read_code
from launchers import run_folders, submit
from launchers.beginning import resumed_config
from launchers.branch import find_parent
from launchers.checks import check_export, check_inputs
from launchers.clusters.local import LocalMachine
from launchers.command_line import parse_time
from launchers.run_folders import create_run, existing_run, new_run, only_launcher, staged_run, with_absolute_paths


def run_submit(*arguments: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECKOUT / "launchers" / "submit.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(data=dataset(tmp_path / "data")))
    return file


def test_dry_run_prints_plan_and_script_from_any_folder_in_two_seconds_without_torch(tmp_path: Path):
    before = os.times()
    config = str(CHECKOUT / "configs" / "lsun_bedroom_ct.yaml")
    ran = run_submit("--nodes", "8", "--partition", "gpu", "--time", "2-00:00", "--dry-run", config, cwd=tmp_path)
    after = os.times()
    assert ran.returncode == 0, ran.stderr
    for words in ("2048 = 64 ranks x 8 accumulated x 4", "1,000,000", "2,048,000,000", "2 days", "s3://"):
        assert words in ran.stdout
    for line in (
        "#SBATCH --nodes=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=2880",
        "#SBATCH --requeue",
    ):
        assert line in ran.stdout
    assert "-K1" in ran.stdout
    assert "#SBATCH --signal=USR2@120" in ran.stdout
    assert list(tmp_path.iterdir()) == []
    # Processor time, which is the wall's on a machine with nothing else to do.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_launchers_import_no_torch():
    code = "import sys; sys.argv[0] = 'x'; import launchers.submit, launchers.evaluate, launchers.job;"
    code += "import launchers.clusters.slurm_epilogue, launchers.clusters.local_controller;"
    code += "print([name for name in ('torch', 'numpy', 'boto3', 'deepspeed') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_cpu_ranks_ask_slurm_for_no_gpus(tmp_path: Path, config_file: Path):
    ran = run_submit(
        "--cluster",
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--dry-run",
        str(config_file),
        cwd=tmp_path,
    )
    assert "#SBATCH --ntasks-per-node=2" in ran.stdout
    assert "--gpus" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus-per-node", "3", "CONFIG"], "train.global_batch_size: 8 is not divisible by 3 ranks"),
        (["CONFIG", "train.sed=1"], "did you mean train.seed"),
        (["CONFIG", "engine.device=cuda"], "no CUDA device"),
        (["--nodes", "2", "--cluster", "local", "CONFIG"], "--nodes 2: this machine is one node"),
        (["--cluster", "slurm", "CONFIG"], "no sbatch"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        ([], "no config given"),
        (["CONFIG", "CONFIG"], "one config at a time"),
        (["--name", "../up", "CONFIG"], "--name '../up'"),
        (["--fresh", "CONFIG"], "--fresh: has no effect without --resume"),
        (["--resume", "nobody"], "--resume nobody: no run there"),
        (["CONFIG", "data.path=nodata"], "no such folder"),
        (["CONFIG", "model.image_size=16"], "images of 8 px, model.image_size is 16"),
        (
            ["--evaluate-every", "1000", "CONFIG", "evaluate.inception_weights=nofile.pth"],
            "nofile.pth: no such file or folder",
        ),
        (["--name", "taken", "CONFIG"], "exists; continue it with --resume taken"),
        (["--name", "left", "CONFIG"], "left exists and is no run (no config.yaml); move it away"),
    ],
)
def test_mistake_is_one_line_with_status_2_and_leaves_nothing(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("left", "taken"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "config.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["submit.py", *(str(config_file) if a == "CONFIG" else a for a in arguments)])
    assert submit.guarded(submit.main) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["left", "taken"]


def test_flags_that_are_no_numbers_are_refused_with_status_2(tmp_path: Path, config_file: Path):
    for flags in (["--nodes", "0"], ["--time", "soon"], ["--gpus-per-node", "two"]):
        ran = run_submit(*flags, str(config_file), cwd=tmp_path)
        assert ran.returncode == 2
        assert f"argument {flags[0]}: got '{flags[1]}'" in ran.stderr


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("01:30:00", 90), ("00:00:01", 1), ("2-00", 2880), ("1-02:03", 1563), ("1-00:00:30", 1441)],
)
def test_time_is_read_as_minutes_or_as_slurm_writes_it(text: str, minutes: int):
    assert parse_time(text) == minutes


def test_run_folder_holds_resolved_config_and_provenance(tmp_path: Path, config_file: Path):
    config = with_absolute_paths(read_config(config_file))
    run = new_run(name="one", runs_dir=Place(tmp_path / "runs"), stem="tiny")
    create_run(run, config, read_code())
    assert read_config(run.config) == config
    (start,) = json.loads(run.provenance.read_text())["starts"]
    assert start["packages"]["torch"]
    assert start["command"]
    assert start["host"]
    assert (
        existing_run("one", runs_dir=Place(tmp_path / "runs"))
        == existing_run(str(run.root), runs_dir=Place("x"))
        == run
    )


def test_no_room_for_the_run_leaves_no_folder(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch):
    run = new_run(name="full", runs_dir=Place(tmp_path / "runs"), stem="tiny")

    def no_room(*_: object) -> None:
        raise UserError("no space left on the device")

    monkeypatch.setattr("launchers.run_folders.replace_durably", no_room)
    with pytest.raises(UserError, match="no space"):
        create_run(run, read_config(config_file), read_code())
    assert not run.root.exists()


def test_a_folder_in_which_python_would_find_no_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--runs-dir: .*/a:b: Python finds no code below a folder with a colon"):
        new_run(name="one", runs_dir=Place(tmp_path / "a:b"), stem="x")


def test_a_command_that_is_killed_while_it_makes_a_run_leaves_its_name_free(tmp_path: Path, config_file: Path):
    run, config, code = new_run(name="one", runs_dir=Place(tmp_path), stem="x"), read_config(config_file), read_code()
    child = os.fork()
    if child == 0:
        run_folders.replace_durably = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        create_run(run, config, code)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not run.root.exists()
    create_run(run, config, code)
    assert read_config(run.config) == config


def test_of_two_commands_that_make_a_run_the_slower_one_is_refused(tmp_path: Path, config_file: Path):
    run, config, code = new_run(name="one", runs_dir=Place(tmp_path), stem="x"), read_config(config_file), read_code()
    slower = staged_run(run)
    slower.__enter__().config.write_text("of the slower one")
    create_run(run, config, code)
    with pytest.raises(UserError, match="continue it with --resume one"):
        slower.__exit__(None, None, None)
    assert read_config(run.config) == config
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")] == []


def test_local_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = CONFIG.format(data="some/data")
    config = with_absolute_paths(parse_config(text, ["checkpoint.export_to=s3://bucket/x"]))
    assert config.data.path == str(tmp_path / "some" / "data")
    assert config.checkpoint.export_to == "s3://bucket/x"


class TestResume:
    @pytest.fixture
    def run(self, tmp_path: Path, config_file: Path) -> RunDir:
        run = new_run(name="old", runs_dir=Place(tmp_path / "runs"), stem="tiny")
        create_run(run, with_absolute_paths(read_config(config_file)), read_code())
        return run

    def test_operational_values_may_change(self, run: RunDir):
        config = resumed_config(run, None, ["train.micro_batch_size=4", "engine.zero_stage=1"])
        assert (config.train.micro_batch_size, config.engine.zero_stage) == (4, 1)

    @pytest.mark.parametrize("override", ["train.seed=5", "train.global_batch_size=16", "method.p_mean=-1.0"])
    def test_values_that_move_losses_are_refused_with_the_difference(self, run: RunDir, override: str):
        key, _, value = override.partition("=")
        with pytest.raises(UserError, match=rf"{key}: \S+ -> {value}"):
            resumed_config(run, None, [override])

    def test_the_branch_that_is_advised_is_found_from_any_folder(
        self, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        with pytest.raises(UserError) as caught:
            resumed_config(run, None, ["train.seed=5"])
        advised = str(caught.value).partition("--branch ")[2].removesuffix(" --name NEW")
        with pytest.raises(UserError, match="the run has no complete checkpoint yet"):  # found
            find_parent(advised, runs_dir=Place("runs"))

    def test_another_config_file_is_refused_with_the_difference(self, run: RunDir, config_file: Path):
        other = config_file.with_name("other.yaml")
        other.write_text(config_file.read_text().replace("channels: 32", "channels: 64"))
        with pytest.raises(UserError, match=r"model\.channels: 32 -> 64"):
            resumed_config(run, str(other), [])

    def test_a_run_that_another_launcher_runs_is_refused_and_left_as_it_is(
        self, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.setattr(LocalMachine, "run", lambda *_, **__: pytest.fail("started"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        before = run.config.read_bytes(), run.provenance.read_bytes()
        monkeypatch.setattr(sys, "argv", ["submit.py", "--cluster", "local", "--resume", str(run.root)])
        with only_launcher(run, "train"):
            assert submit.guarded(submit.main) == 2
        said = capsys.readouterr()
        assert "another launcher is running this run" in said.err
        assert said.out == ""
        assert (run.config.read_bytes(), run.provenance.read_bytes()) == before

    def test_finished_run_says_so_and_starts_nothing(
        self, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        folder = run.checkpoint(3)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        monkeypatch.setattr(LocalMachine, "run", lambda *_, **__: pytest.fail("started"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert submit.main(["--cluster", "local", "--resume", str(run.root)]) == 0
        assert f"finished: step 3 of 3\nrun: {run.root}\n" in capsys.readouterr().out


def test_a_local_place_for_exports_is_tried_out_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_export(str(tmp_path / "new" / "copies"), "one", is_new=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for place, words in ((tmp_path / "file", "a file"), (Path("/proc/nowhere"), "No such file")):
        with pytest.raises(UserError, match=rf"^checkpoint.export_to: .*{words}"):
            check_export(str(place), "one", is_new=True)
    monkeypatch.setattr(LocalStorage, "read", lambda *_: b"other")
    with pytest.raises(UserError, match="does not give back what was written"):
        check_export(str(tmp_path / "copies"), "one", is_new=True)


class TestS3:
    """What S3 says before anything is created."""

    def config(self, url: str, *overrides: str):
        return parse_config(CONFIG.format(data=url), list(overrides))

    def test_no_such_bucket(self, s3: str):
        with pytest.raises(UserError, match="no bucket 'nobody-has-this'"):
            check_inputs(self.config("s3://nobody-has-this/data"))

    def test_no_such_bucket_to_export_to(self, s3: str):
        with pytest.raises(UserError, match="no bucket 'nobody-has-this'"):
            check_export("s3://nobody-has-this/runs", "one", is_new=True)

    def test_an_earlier_run_of_the_name_exported_there(self, s3: str):
        open_storage(f"{s3}/runs/one").write("checkpoints/step-000000001/manifest.json", b"{}")
        check_export(f"{s3}/runs", "one", is_new=False)
        check_export(f"{s3}/runs", "two", is_new=True)
        assert [entry.key for entry in open_storage(s3).list()] == ["runs/one/checkpoints/step-000000001/manifest.json"]
        with pytest.raises(UserError, match="holds checkpoints of an earlier run one"):
            check_export(f"{s3}/runs", "one", is_new=True)

    def test_missing_credentials(self, s3: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        with pytest.raises(UserError, match="no S3 credentials"):
            check_inputs(self.config(f"{s3}/data"))

    def test_nothing_prepared_there(self, s3: str):
        with pytest.raises(UserError, match="no prepared data set"):
            check_inputs(self.config(f"{s3}/data"))

    def test_weights_that_are_not_there(self, s3: str, tmp_path: Path):
        text = CONFIG.format(data=dataset(tmp_path / "data")).replace(
            "kind: edm", f"kind: cd\n  teacher: {s3}/teacher.pt"
        )
        with pytest.raises(UserError, match=r"method\.teacher: .*teacher\.pt: no such object"):
            check_inputs(parse_config(text))


def test_teacher_run_without_a_checkpoint_is_refused(tmp_path: Path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.yaml").write_text("")
    text = CONFIG.format(data=dataset(tmp_path / "data")).replace("kind: edm", f"kind: cd\n  teacher: {teacher}")
    with pytest.raises(UserError, match=r"method\.teacher: run .* has no complete checkpoint"):
        check_inputs(parse_config(text))


def test_empty_data_set_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="the data set is empty"):
        check_inputs(parse_config(CONFIG.format(data=dataset(tmp_path / "data", count=0))))
