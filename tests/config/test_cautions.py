"""Tests of cautions: what a config does that its user may not expect, in lines that name keys, values and the cure."""

import math
from pathlib import Path

import pytest
from scipy.stats import norm

from cmscale.config import Config, parse_config, read_config
from cmscale.config.cautions import cautions
from cmscale.config.methods.continuous import noise_for_size

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEXT = """
method: {kind: scd, teacher: t}
model: {image_size: 256, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1, head_channels: 32}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 2048, micro_batch_size: 4}
"""
WIDE = ["method.p_mean=0.04", "method.p_std=1.92"]


def config_of(*overrides: str) -> Config:
    return parse_config(TEXT, list(overrides))


def test_no_config_that_the_project_ships_needs_a_caution():
    assert {path.stem: found for path in CONFIGS if (found := cautions(read_config(path)))} == {}


@pytest.mark.parametrize("kind", ["scd", "sct"])
@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ([], False),
        (["method.tangent=jvp"], True),
        (["method.tangent=jvp", "method.teacher_time_embedding=angle"], False),
        (["method.teacher_time_embedding=angle"], False),
        (["method.tangent=jvp", "model.noise_embedding_scale=1.0"], False),
    ],
)
def test_a_fast_embedding_that_meets_the_jvp_is_named(kind: str, more: list[str], warned: bool):
    start = ["method.kind=sct", "method.start=teacher"] if kind == "sct" else []
    found = cautions(config_of(*start, *WIDE, *more))
    assert [line.split(":")[0] for line in found] == ["method.tangent"] * warned
    assert not warned or "method.tangent=auto" in found[0]


def test_a_step_at_which_no_checkpoint_is_written_is_named_where_it_should_be_kept():
    (found,) = cautions(config_of(*WIDE, "checkpoint.keep_every=2500"))
    assert "2500 is no multiple of checkpoint.every_steps, 1000, so" in found
    assert "every 5000 steps; set checkpoint.keep_every to a multiple of 1000" in found
    for every in (0, 500, 1000, 3000):
        assert cautions(config_of(*WIDE, f"checkpoint.keep_every={every}")) == []


@pytest.mark.parametrize(
    ("alone", "with_effect"),
    [
        ("checkpoint.export_keep_last=3", "checkpoint.export_to=s3://bucket/runs"),
        ("train.consistency_error_data=s3://bucket/held_out", "train.consistency_error_every=100"),
    ],
)
def test_a_value_without_effect_is_named_with_the_key_that_gives_it_one(alone: str, with_effect: str):
    (found,) = cautions(config_of(*WIDE, alone))
    assert found.startswith(alone.replace("=", ": ") + " has no effect; set " + with_effect.partition("=")[0])
    assert cautions(config_of(*WIDE, alone, with_effect)) == []


def test_noise_that_hardly_reaches_where_sampling_starts_is_named_with_the_values_to_set():
    (found,) = cautions(config_of())
    assert "0.46 of the 2048 images of a step have a sigma above 50, but sampling starts at 80" in found
    assert "method.p_mean=0.04 method.p_std=1.92" in found
    assert cautions(config_of(*WIDE)) == []
    assert cautions(config_of("model.image_size=32")) == []  # what the values were chosen for


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_the_noise_for_a_size_keeps_the_lower_end_and_moves_the_upper_with_the_size(size: int):
    mean, std = noise_for_size(size)
    assert mean - 2 * std == pytest.approx(-1.0 - 2 * 1.4)
    assert mean + 2 * std == pytest.approx(-1.0 + 2 * 1.4 + math.log(size / 32))
    assert size != 64 or std == pytest.approx(1.6, abs=0.05)  # the paper's for ImageNet 64
    above = 2048 * norm.sf(math.log(50), mean, std)
    assert size != 256 or above == pytest.approx(44.7, abs=0.5)
    assert size != 32 or above == pytest.approx(0.46, abs=0.01)


@pytest.mark.parametrize(
    ("method", "precision", "warned"),
    [
        (["method.kind=ict"], "bf16", True),
        (["method.kind=ict"], "fp16", False),
        (["method.kind=ict"], "fp32", False),
        (["method.kind=ict", "method.s1=160"], "bf16", False),
        (["method.kind=ct"], "bf16", False),
        (["method.kind=ect", "method.teacher=t"], "bf16", True),
        (["method.kind=ect", "method.teacher=t", "method.num_stages=4"], "bf16", False),
        (["method.kind=cd", "method.teacher=t"], "bf16", False),
        (["method.kind=edm"], "bf16", False),
    ],
)
def test_rounding_as_large_as_the_difference_between_neighbours_is_named(
    method: list[str], precision: str, warned: bool
):
    text = TEXT.replace("method: {kind: scd, teacher: t}\n", "method: {}\n")
    found = cautions(parse_config(text, [*method, f"engine.precision={precision}"]))
    assert [line.split(":")[0] for line in found] == ["engine.precision"] * warned


def test_the_smallest_gap_is_that_of_the_last_two_times_of_the_grid():
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    before = (low + 1279 / 1280 * (high - low)) ** 7
    text = TEXT.replace("{kind: scd, teacher: t}", "{kind: ict}")
    assert parse_config(text).method.smallest_gap == pytest.approx(math.log(80 / before), rel=1e-12)
