"""Evaluations beside training: each due checkpoint gets one job, whoever is logged in, and is kept until then."""

import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from launch_fixtures import CONFIG

from cmscale.config import Config, Restart, Slurm, parse_config
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from launchers import beside
from launchers.beside import arguments_of, ask_for_all, due, kept_beside, outside_of_jobs, with_kept_checkpoints
from launchers.plan import Plan
from launchers.slurm import script_text

PLAN = Plan("slurm", 4, 8, True, "gpu", 60, Slurm(), Restart())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Checkpoints of steps 0 to 5, that of step 4 unfinished; the last step is 5."""
    run = RunDir(tmp_path / "a run")
    run.root.mkdir()
    run.config.write_text(CONFIG.format(data="data").replace("total_steps: 3", "total_steps: 5"))
    for step in range(6):
        run.checkpoint(step).mkdir(parents=True)
        if step != 4:
            (run.checkpoint(step) / "manifest.json").write_text("{}")
    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run; the first one fails."""
    commands: list[list[str]] = []

    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=int(len(commands) == 1))

    monkeypatch.setattr(beside.subprocess, "run", ran)
    return commands


def test_every_nth_committed_step_and_the_last_are_due(run: RunDir) -> None:
    assert list(due(run, every=2)) == [2, 5]
    (run.checkpoint(4) / "manifest.json").write_text("{}")
    assert list(due(run, every=2)) == [2, 4, 5]
    assert list(due(run, every=3)) == [3, 5]


def test_each_is_asked_for_once_and_again_where_nothing_was_submitted(run: RunDir, asked: list[list[str]]) -> None:
    flags = ["--cluster", "slurm", "--gpus-per-node", "8"]
    assert beside.main(["--once", *arguments_of(run, replace(PLAN, partition=None), 2)]) == 0
    assert [command[-1] for command in asked] == ["2", "5"]
    assert asked[0][1:] == [str(Path(beside.__file__).with_name("evaluate.py")), *flags, str(run.root), "--step", "2"]
    ask_for_all(run, every=2, flags=flags)  # the first one had failed
    ask_for_all(run, every=2, flags=flags)
    assert [command[-1] for command in asked] == ["2", "5", "2"]


def test_an_evaluation_that_was_refused_is_not_asked_for_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = subprocess.CompletedProcess([], returncode=2)
    monkeypatch.setattr(beside.subprocess, "run", lambda *_, **__: refused)
    ask_for_all(run, every=2, flags=["--cluster", "slurm"])
    assert capsys.readouterr().out.count("exit status 2") == 2
    assert list(due(run, every=2)) == []


def test_slurms_word_to_the_training_job_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "SBATCH_REQUEUE", "HOME"):
        monkeypatch.setenv(name, "here")
    names = set(outside_of_jobs())
    assert {"SLURM_CONF", "HOME"} <= names
    assert not {"SLURM_JOB_ID", "SBATCH_REQUEUE"} & names


def test_the_batch_script_looks_while_ranks_run_and_once_after_them(run: RunDir) -> None:
    plan = replace(PLAN, beside=arguments_of(run, PLAN, 1000))
    lines = script_text(run, plan, submission="one").splitlines()
    command = f"-m launchers.beside '{run.root}' --every 1000 -- --cluster slurm --gpus-per-node 8 --partition gpu"
    (during,) = (number for number, line in enumerate(lines) if line.endswith(f"{command} &"))
    (ranks,) = (number for number, line in enumerate(lines) if line.startswith("srun"))
    (status,) = (number for number, line in enumerate(lines) if line == "status=$?")
    (after,) = (number for number, line in enumerate(lines) if "launchers.beside --once" in line)
    assert during < ranks < status < after < len(lines) - 1
    assert "launchers.restart" in lines[after + 1]
    assert "launchers.beside" not in script_text(run, PLAN, submission="one")


def config(**checkpoint: int) -> Config:
    found = parse_config(CONFIG.format(data="data"))
    return found.model_copy(update={"checkpoint": found.checkpoint.model_copy(update=checkpoint)})


@pytest.mark.parametrize(("keep_every", "kept"), [(0, 200), (100, 100), (300, 100), (400, 200)])
def test_checkpoints_to_evaluate_are_kept(keep_every: int, kept: int) -> None:
    assert with_kept_checkpoints(config(every_steps=100, keep_every=keep_every), 200).checkpoint.keep_every == kept


@pytest.mark.parametrize("every", [150, 0, -100])
def test_steps_without_a_checkpoint_are_refused(every: int) -> None:
    with pytest.raises(UserError, match=f"--evaluate-every {every}: checkpoints are written every 100 steps"):
        with_kept_checkpoints(config(every_steps=100), every)


def test_here_it_ends_with_training_and_looks_a_last_time_only_if_that_went_well(run: RunDir) -> None:
    for step in (2, 5):
        run.asked_evaluation(step).parent.mkdir(parents=True, exist_ok=True)
        run.asked_evaluation(step).touch()
    arguments = arguments_of(run, replace(PLAN, cluster="local"), 2)
    before = set(psutil.Process().children())
    with kept_beside(arguments) as finish:
        finish()
    with pytest.raises(KeyboardInterrupt), kept_beside(arguments):
        raise KeyboardInterrupt
    assert set(psutil.Process().children()) <= before  # neither left a process behind
