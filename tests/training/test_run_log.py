"""Tests of the lines that a training prints."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from networks import small_config, small_model

from cmscale.config import dump_config, parse_config, schedules
from cmscale.distributed.world import World
from cmscale.engine.engine import StepResult
from cmscale.model.attention_choice import Choice
from cmscale.report.happened import stretches
from cmscale.runs.folder import RunDir
from cmscale.runs.log import latest_metrics, read_lines
from cmscale.runs.manifests import TrainState
from cmscale.training.run_log import RunLog


def make_log(run: RunDir, *overrides: str) -> RunLog:
    config = parse_config(dump_config(small_config(small_model())), [*overrides, "wandb.mode=off"])
    batches: Any = SimpleNamespace(bad={}, bad_shards={})
    usage: Any = SimpleNamespace(of=lambda speed: {})
    return RunLog(config, run, World(), batches=batches, usage=usage)


def log_step(log: RunLog, step: int) -> None:
    state = TrainState(step=step, cursor=step * log._config.train.global_batch_size)
    values = schedules.at(log._config, step - 1)
    log.stepped(state, values, StepResult(True, 0.5, 1.0, 1.0), measured={})


def test_the_first_step_of_a_start_which_waits_for_much_says_nothing_of_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    log = make_log(run, "train.total_steps=9", "train.log_every=1")
    log_step(log, 1)
    log_step(log, 2)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1/9  loss 0.5"
    assert second.startswith("step 2/9  loss 0.5  ")
    assert second.endswith(" left")
    assert "images_per_second" in latest_metrics(run)[0]


def test_a_rate_over_several_steps_is_shown_also_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_step(make_log(RunDir(tmp_path), "train.log_every=3"), 3)
    assert capsys.readouterr().out.endswith(" left\n")


@pytest.mark.parametrize(("more", "cautions"), [(0, 0), (1, 1)])
def test_more_workers_than_processors_are_one_caution(more: int, cautions: int, tmp_path: Path) -> None:
    processors, run = len(os.sched_getaffinity(0)), RunDir(tmp_path)
    log = make_log(run, f"data.workers={processors + more}")
    log.started(TrainState(step=0, cursor=0), attention=Choice("sdpa", ""))
    said = [each["why"] for each in read_lines(run.events) if each["event"] == "caution"]
    assert len(said) == cautions
    assert all(f"set data.workers={processors} or fewer" in why for why in said)


def test_a_start_says_until_when_the_one_before_it_which_was_killed_had_measured(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    killed, attention = make_log(run, "train.log_every=1"), Choice("sdpa", "")
    killed.started(TrainState(step=0, cursor=0), attention=attention)
    log_step(killed, 1)
    until = run.metrics.stat().st_mtime
    make_log(run).started(TrainState(step=0, cursor=0), attention=attention)
    make_log(run).started(TrainState(step=1, cursor=4), attention=attention)
    starts = [each for each in read_lines(run.events) if each["event"] in ("start", "resumed")]
    assert [each.get("measured_until") for each in starts] == [None, until, until]
    assert [each.seconds for each in stretches(starts)] == [until - starts[0]["time"], 0, 0]
