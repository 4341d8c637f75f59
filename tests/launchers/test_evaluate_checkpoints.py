"""Evaluations during training: each due checkpoint gets one job, without anybody logged in, and is kept until then."""

import errno
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from launch_fixtures import CHECKOUT, CONFIG, placement

from cmscale.config import Config, parse_config
from cmscale.errors import UserError
from cmscale.io.process import node_name, start_of
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from launchers import evaluate_checkpoints
from launchers.clusters.slurm import script_text
from launchers.evaluate_checkpoints import (
    AGAIN_SECONDS,
    LOOK_SECONDS,
    arguments_for,
    due,
    evaluating,
    look,
    request_due,
    with_kept_checkpoints,
)
from launchers.jobs import TRAIN, JobSpec

PLACEMENT = placement(nodes=4, ranks_per_node=8, gpus=True, partition="gpu")


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

    monkeypatch.setattr(evaluate_checkpoints.subprocess, "run", ran)
    return commands


def test_every_nth_committed_step_and_the_last_are_due(run: RunDir) -> None:
    assert list(due(run, every=2)) == [2, 5]
    (run.checkpoint(4) / "manifest.json").write_text("{}")
    assert list(due(run, every=2)) == [2, 4, 5]
    assert list(due(run, every=3)) == [3, 5]


def test_each_is_asked_for_once_and_again_where_nothing_was_submitted(run: RunDir, asked: list[list[str]]) -> None:
    flags = ["--cluster", "slurm", "--gpus-per-node", "8"]
    assert evaluate_checkpoints.main(["--once", *arguments_for(run, replace(PLACEMENT, partition=None), 2)]) == 1
    (event,) = read_lines(run.events)  # nobody looks again after the last step
    assert (event["event"], event["step"]) == ("evaluation_not_submitted", 2)
    assert event["why"].endswith(f"; to evaluate: python launchers/evaluate.py '{run.root}' --checkpoint 2")
    assert [command[-1] for command in asked] == ["2", "5"]
    assert asked[0][1:] == [
        str(Path(evaluate_checkpoints.__file__).with_name("evaluate.py")),
        *flags,
        str(run.root),
        "--checkpoint",
        "2",
    ]
    request_due(run, every=2, flags=flags)  # the first one had failed
    request_due(run, every=2, flags=flags)
    assert [command[-1] for command in asked] == ["2", "5", "2"]


def test_the_checkpoint_of_a_run_that_started_afresh_is_asked_for_and_markers_of_older_versions_count(
    run: RunDir, asked: list[list[str]]
) -> None:
    for _ in range(3):
        request_due(run, every=2, flags=[])
    assert [command[-1] for command in asked] == ["2", "5", "2"]
    (run.checkpoint(2) / "manifest.json").write_text('{"other": "files"}')
    assert list(due(run, every=2)) == [2]
    run.asked_evaluation(2).touch()
    assert list(due(run, every=2)) == []


def test_an_evaluation_that_was_refused_is_not_asked_for_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = subprocess.CompletedProcess([], returncode=2)
    monkeypatch.setattr(evaluate_checkpoints.subprocess, "run", lambda *_, **__: refused)
    request_due(run, every=2, flags=["--cluster", "slurm"])
    assert capsys.readouterr().out.count("exit status 2") == 2
    assert list(due(run, every=2)) == []


def test_an_evaluation_that_can_not_be_submitted_now_is_asked_for_again_after_a_while(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, waits = subprocess.CompletedProcess([], returncode=1), []
    monkeypatch.setattr(evaluate_checkpoints.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(
        evaluate_checkpoints.threading.Event, "wait", lambda _, wait: waits.append(wait) or len(waits) > 2
    )
    monkeypatch.setattr(evaluate_checkpoints.signal, "signal", lambda *_: None)
    monkeypatch.setattr(evaluate_checkpoints, "die_with_parent", lambda _: None)
    evaluate_checkpoints.main(list(arguments_for(run, PLACEMENT, 2)))
    assert list(due(run, every=2)) == [2, 5]
    assert waits == [LOOK_SECONDS, AGAIN_SECONDS, AGAIN_SECONDS]


def test_an_evaluation_for_which_no_process_can_be_started_is_asked_for_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(evaluate_checkpoints.subprocess, "run", no_memory)
    assert "Cannot allocate memory" in look(run, every=2, flags=["local"], before="")
    assert list(due(run, every=2)) == [2, 5]


@pytest.mark.parametrize(
    ("started", "steps"), [(start_of(os.getpid()), [5]), ("", [5]), ("17", [2, 5])], ids=["alive", "older", "reused"]
)
def test_a_process_that_has_got_the_number_of_one_that_ended_evaluates_nothing(
    run: RunDir, started: str, steps: list[int]
) -> None:
    marker = run.asked_evaluation(2)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{node_name()} {os.getpid()} {started}".strip())
    assert list(due(run, every=2)) == steps


def test_a_look_that_fails_is_not_the_last_one(
    run: RunDir, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, looks = run.config.read_text(), iter([False, False, False, True])
    run.config.write_text("method: {")

    def next_look(self: object, seconds: float) -> bool:
        if (is_last := next(looks)) is True:
            run.config.write_text(config)
        return is_last

    monkeypatch.setattr(evaluate_checkpoints.threading.Event, "wait", next_look)
    monkeypatch.setattr(evaluate_checkpoints.signal, "signal", lambda *_: None)
    monkeypatch.setattr(evaluate_checkpoints, "die_with_parent", lambda _: None)
    assert evaluate_checkpoints.main(list(arguments_for(run, PLACEMENT, 2))) == 1  # the first one failed
    assert [command[-1] for command in asked] == ["2", "5"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"no evaluations are asked for at the moment: {run.config}")


def test_the_batch_script_looks_while_ranks_run_and_once_after_them(run: RunDir) -> None:
    job = JobSpec(TRAIN, (), run, PLACEMENT, arguments_for(run, PLACEMENT, 1000))
    lines = script_text(job).splitlines()
    flags = "--cluster slurm --gpus-per-node 8 --partition gpu"
    command = f"-m launchers.evaluate_checkpoints '{run.root}' --every 1000 -- {flags}"
    (during,) = (number for number, line in enumerate(lines) if line.endswith(f"{command} &"))
    (ranks,) = (number for number, line in enumerate(lines) if line.startswith("srun"))
    (status,) = (number for number, line in enumerate(lines) if line == "status=$?")
    (after,) = (number for number, line in enumerate(lines) if "launchers.evaluate_checkpoints --once" in line)
    assert during < ranks < status < after < len(lines) - 1
    assert "launchers.clusters.slurm_epilogue" in lines[after + 1]
    assert "evaluate_checkpoints" not in script_text(replace(job, evaluations=()))


def test_evaluations_take_gpus_of_the_type_that_training_has(run: RunDir) -> None:
    flags = arguments_for(run, replace(PLACEMENT, gpu_type="a100"), 2)
    assert flags[flags.index("--gpus-per-node") + 1] == "a100:8"


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


def test_on_this_machine_it_ends_with_training_and_looks_a_last_time_only_if_that_finished(run: RunDir) -> None:
    for step in (2, 5):
        run.asked_evaluation(step).parent.mkdir(parents=True, exist_ok=True)
        run.asked_evaluation(step).touch()
    arguments = arguments_for(run, replace(PLACEMENT, cluster="local"), 2)
    before = set(psutil.Process().children())
    with evaluating(arguments, python_path=str(CHECKOUT)) as finish:
        finish()
    with pytest.raises(KeyboardInterrupt), evaluating(arguments, python_path=str(CHECKOUT)):
        raise KeyboardInterrupt
    assert set(psutil.Process().children()) <= before  # neither left a process behind
