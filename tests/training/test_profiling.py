"""Tests that the chosen steps are profiled, and that the log says how much of the hardware is used."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from cmscale.config import Config, parse_config
from cmscale.distributed.world import World
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.training import usage
from cmscale.training.profiling import Profiler
from cmscale.training.usage import Usage

TEXT = """
method: {kind: ict}
model: {image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}
data: {path: nowhere}
optimizer: {learning_rate: 1e-3}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""


def config_of(*overrides: str) -> Config:
    return parse_config(TEXT, list(overrides))


def steps_of(profiler: Profiler, steps: range) -> None:
    for step in steps:
        profiler.begin(step)
        torch.full((8, 8), float(step)).cumsum(0) if step in (2, 3) else torch.zeros(3).sort()
        profiler.end(step)
    profiler.close()


@pytest.mark.parametrize("steps", [range(1, 6), range(1, 4)])  # the second run ends within the profiled steps
def test_the_chosen_steps_alone_are_profiled(tmp_path: Path, steps: range) -> None:
    run = RunDir(tmp_path)
    last = 3 if steps.stop == 6 else 9
    steps_of(Profiler(config_of(f"train.profile_steps=2:{last}"), run, World()), steps)
    trace = json.loads(gzip.decompress(run.profile_trace(2).read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::cumsum" in names
    assert "aten::sort" not in names
    assert "aten::cumsum" in run.profile_table(2).read_text()
    (event,) = read_lines(run.events)
    assert (event["event"], event["why"].split(",")[0]) == ("profiled", "logs/profile-step-000000002.trace.json.gz")


def test_other_ranks_and_runs_without_chosen_steps_profile_nothing(tmp_path: Path) -> None:
    steps_of(Profiler(config_of("train.profile_steps=2:3"), RunDir(tmp_path), World(rank=1, num_ranks=2)), range(1, 6))
    steps_of(Profiler(config_of(), RunDir(tmp_path), World()), range(1, 6))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["15:10", "0:3", "10", "10:15:20", "a:b"])
def test_steps_that_do_not_ascend_are_refused(steps: str) -> None:
    with pytest.raises(Exception, match="profile_steps"):
        config_of(f"train.profile_steps={steps}")


def test_mfu_is_the_counted_flop_of_the_peak_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "image_flop", lambda config: 2e9)
    found = Usage(config_of("engine.peak_tflops=4"), World(num_ranks=2)).of(1000.0)
    assert found["mfu"] == 0.25  # 2e12 of 8e12 FLOP/s
    assert 0.01 < found["peak_memory_gib"] < 100


def test_a_cpu_without_a_stated_rate_has_no_mfu() -> None:
    assert set(Usage(config_of(), World()).of(1000.0)) == {"peak_memory_gib"}
