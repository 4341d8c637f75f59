"""Tests that the estimate counts the networks, states and passes of real training."""

import math
import re
from pathlib import Path

import pytest

from cmscale.config import Config, parse_config
from cmscale.training.estimate import estimates, forward_flop, num_parameters

TEXT = """
method: METHOD
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, head_channels: 32}
data: {path: nowhere}
optimizer: {learning_rate: 1e-3}
train: {total_steps: 1000, global_batch_size: 8, micro_batch_size: 2}
ema: {rates: [0.9, 0.99]}
engine: {zero_stage: 2, precision: fp16}
"""
METHODS = {  # method: (networks, fp32 values per parameter, forward passes per image)
    "{kind: edm}": (1, 5, 3),
    "{kind: cd, teacher: t, solver: heun}": (3, 6, 6),
    "{kind: cd, teacher: t, solver: euler}": (3, 6, 5),
    "{kind: ct}": (2, 6, 4),
    "{kind: ict}": (1, 5, 4),
    "{kind: ect, teacher: t}": (1, 5, 4),
    "{kind: sct}": (1, 5, 5),
    "{kind: scd, teacher: t}": (2, 5, 7),
    "{kind: scd, teacher: t, tangent: jvp}": (2, 5, 6),
    "{kind: sct, tangent: central_differences}": (1, 5, 6),
    "{kind: pd, teacher: t}": (2, 6, 5),
}


def config_of(method: str, *overrides: str) -> Config:
    return parse_config(TEXT.replace("METHOD", method), list(overrides))


def number(text: str) -> float:
    found = re.match(r"[\d.e+-]+", text)
    assert found is not None, text
    return float(found[0])


@pytest.mark.parametrize("method", METHODS)
def test_networks_states_and_passes_are_the_methods(method: str) -> None:
    networks, states, passes = METHODS[method]
    # a larger parameter count, as this network's memory in GiB would be rounded to 0.00
    config = config_of(method, "model.channels=512", "model.channel_multipliers=[1,4]", "model.head_channels=64")
    count = num_parameters(config)
    rows = dict(estimates(config, num_ranks=2, tflops=1.0))
    gib = count / 2**30
    assert number(rows["weights per rank"]) == pytest.approx(networks * 2 * gib, abs=0.005)
    assert f"({networks} networks, fp16)" in rows["weights per rank"]
    assert number(rows["fp32 states per rank"]) == pytest.approx(states * 4 * gib / 2, abs=0.005)
    assert number(rows["checkpoint"]) == pytest.approx(states * 4 * gib, abs=0.005)
    assert ("target" in rows["fp32 states per rank"]) == (states == 6)
    days = 8000 * passes * forward_flop(config) / (2 * 1e12) / 86400
    assert number(rows["time"]) == pytest.approx(days, rel=5e-3)
    assert math.isfinite(days)


@pytest.mark.parametrize(("stage", "weights", "gradients", "states"), [(0, 1, 1, 1), (1, 1, 1, 2), (3, 2, 2, 2)])
def test_what_a_zero_stage_shares_is_divided_by_the_ranks(
    stage: int, weights: int, gradients: int, states: int
) -> None:
    config = config_of("{kind: ct}", f"engine.zero_stage={stage}", "model.channels=512", "model.head_channels=64")
    gib = num_parameters(config) / 2**30
    rows = dict(estimates(config, num_ranks=2, tflops=1.0))
    assert number(rows["weights per rank"]) == pytest.approx(2 * 2 * gib / weights, abs=0.005)
    assert number(rows["gradients per rank"]) == pytest.approx(2 * gib / gradients, abs=0.005)
    assert number(rows["fp32 states per rank"]) == pytest.approx(6 * 4 * gib / states, abs=0.005)


def test_the_lsun_network_has_the_papers_size() -> None:
    config = parse_config((Path(__file__).parents[2] / "configs" / "lsun_bedroom_ct.yaml").read_text())
    assert num_parameters(config) == pytest.approx(526.3e6, rel=1e-4)
