"""Tests of the lines that a training prints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from networks import small_config, small_model

from cmscale.config import dump_config, parse_config, schedules
from cmscale.distributed.world import World
from cmscale.engine.engine import StepResult
from cmscale.runs.folder import RunDir
from cmscale.runs.log import latest_metrics
from cmscale.runs.manifests import TrainState
from cmscale.training.run_log import RunLog


def test_the_first_step_of_a_start_which_waits_for_much_says_nothing_of_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(
        dump_config(small_config(small_model())), ["train.total_steps=9", "train.log_every=1", "wandb.mode=off"]
    )
    run = RunDir(tmp_path)
    inputs: dict[str, Any] = {
        "batches": SimpleNamespace(bad={}, bad_shards={}),
        "usage": SimpleNamespace(of=lambda speed: {}),
    }
    log = RunLog(config, run, World(), **inputs)
    for step in (1, 2):
        state = TrainState(step=step, cursor=step * config.train.global_batch_size)
        result = StepResult(True, 0.5, 1.0, 1.0)
        log.stepped(state, schedules.at(config, step - 1), result, measured={})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1/9  loss 0.5"
    assert second.startswith("step 2/9  loss 0.5  ")
    assert second.endswith(" left")
    assert "images_per_second" in latest_metrics(run)[0]


def test_a_rate_over_several_steps_is_shown_also_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_config(dump_config(small_config(small_model())), ["train.log_every=3", "wandb.mode=off"])
    inputs: dict[str, Any] = {
        "batches": SimpleNamespace(bad={}, bad_shards={}),
        "usage": SimpleNamespace(of=lambda speed: {}),
    }
    state = TrainState(step=3, cursor=3 * config.train.global_batch_size)
    log = RunLog(config, RunDir(tmp_path), World(), **inputs)
    log.stepped(state, schedules.at(config, 2), StepResult(True, 0.5, 1.0, 1.0), measured={})
    assert capsys.readouterr().out.endswith(" left\n")
