"""Tests of a disk that takes nothing for a while: what training can do without does not end it."""

import errno
import io
import math
import sys
from pathlib import Path

import pytest
import torch

from cmscale.config import Config, parse_config
from cmscale.data import Batch
from cmscale.distributed.world import World
from cmscale.engine.engine import StepResult
from cmscale.io.remarks import say
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState
from cmscale.training import stragglers
from cmscale.training.bad_steps import BadSteps
from cmscale.training.sample_grid import Grids
from cmscale.training.stragglers import Stragglers

BATCH = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), (0, 1), ("a", "b"), torch.zeros(2, dtype=torch.bool))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run's folder in which neither events nor logs nor samples can be written."""
    run = RunDir(tmp_path)
    run.events.mkdir()
    run.logs.touch()
    run.samples.touch()
    return run


def config() -> Config:
    model = "{image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}"
    train = "{total_steps: 9, global_batch_size: 2, micro_batch_size: 2, sample_every: 5}"
    text = f"method: {{kind: ict}}\nmodel: {model}\ndata: {{path: nowhere}}\ntrain: {train}\n"
    return parse_config(text + "optimizer: {learning_rate: 1e-3}")


def test_a_batch_without_a_finite_loss_need_not_be_saved(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    bad = StepResult(applied=False, loss=math.nan, grad_norm=math.inf, loss_scale=1.0)
    steps, state = BadSteps(config(), run, World()), TrainState(step=4, cursor=10)
    assert [steps.must_roll_back(bad, BATCH, state) for _ in range(3)] == [False, False, True]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("logs/nonfinite-step-000000004-cursor-10-rank-0000.safetensors is not written: ")
    assert said[3].startswith("rolled_back is not written: ")


def test_a_batch_of_a_run_that_was_moved_away_does_not_make_its_folder_anew(tmp_path: Path, capsys) -> None:
    bad = StepResult(applied=False, loss=math.nan, grad_norm=math.inf, loss_scale=1.0)
    gone = RunDir(tmp_path / "moved")
    assert not BadSteps(config(), gone, World()).must_roll_back(bad, BATCH, TrainState(step=4, cursor=10))
    assert f"is not written: there is no folder {gone.logs}" in capsys.readouterr().out
    assert not gone.root.exists()


def test_a_grid_of_samples_need_not_be_saved(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    Grids(config(), run, World(), engine=None).after(1, BATCH)  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().out.startswith("real.png is not written: ")


def test_a_straggler_need_not_be_recorded(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stragglers, "gather", lambda own: [own, own, own + 3.0])
    watch = Stragglers(run, World(), every=1)
    watch.begin()
    watch.stepped(1, ready=1.0, forward=1.0)
    assert capsys.readouterr().out.startswith("straggler at step 1 is not written: ")


def test_a_line_for_a_log_on_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(OSError(errno.ENOSPC, "No space left on device")))
    say("step 1/9")


def test_a_line_that_nobody_reads_any_more_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        say("step 1/9")


class Failing(io.StringIO):
    """A stream that takes lines and can't pass them on."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def flush(self) -> None:
        raise self._error
