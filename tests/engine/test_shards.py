"""The flat space: which rank holds which elements, and how the EMAs and the target are updated."""

import pytest
import torch
from flat_state import SHAPES, StandIn, parameters_of

from cmscale.config.schedules import ScheduleValues
from cmscale.engine.checkpoint_reader import by_name
from cmscale.engine.flat_space import flatten
from cmscale.runs.manifests import MOMENTS


def test_the_flat_space_holds_parameters_in_model_order_without_gaps() -> None:
    tensors = {p.name: torch.randn(p.shape) for p in parameters_of(SHAPES)}
    flat = flatten(tensors, parameters_of(SHAPES))
    assert flat.numel() == 3 * 5 + 3 + 8 + 1
    assert torch.equal(flat[:15], tensors["a_weight"].flatten())
    assert all(torch.equal(value, tensors[name]) for name, value in by_name(flat, parameters_of(SHAPES)).items())


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_averages_and_target_follow_the_masters_at_their_rates(zero_stage: int) -> None:
    state = StandIn(1, 2, zero_stage=zero_stage)
    before = {name: state.shards.local(name).clone() for name in state.shards.quantities}
    state.shards.update(ScheduleValues(step=3, learning_rate=1.0, target_ema=0.75))
    for name, rate in (("target", 0.75), ("ema_0.9", 0.9), ("ema_0.5", 0.5)):
        expected = rate * before[name].double() + (1 - rate) * before["master"].double()
        torch.testing.assert_close(state.shards.local(name).double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(state.shards.local("master"), before["master"])
    assert torch.equal(state.published, state.shards.local("target"))


def test_a_target_rate_of_zero_makes_the_target_the_master_exactly() -> None:
    state = StandIn(0, 1)
    state.shards.update(ScheduleValues(step=0, learning_rate=1.0, target_ema=0.0))
    assert torch.equal(state.shards.local("target"), state.shards.local("master"))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_starting_over_keeps_the_masters_and_nothing_else(zero_stage: int) -> None:
    state = StandIn(1, 2, zero_stage=zero_stage)
    before = state.shards.local("master").clone()
    state.shards.start_over()
    for name in ("master", "target", "ema_0.9", "ema_0.5"):
        assert torch.equal(state.shards.local(name), before)
    assert not any(state.shards.local(name).any() for name in MOMENTS)
    assert torch.equal(state.published, before)


def test_a_target_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step 7.*target_ema"):
        StandIn(0, 1).shards.update(ScheduleValues(step=7, learning_rate=1.0))


def test_set_masters_starts_every_average_there() -> None:
    state = StandIn(1, 3, has_target=False)
    flat = torch.arange(float(state.shards.num_elements))
    state.shards.set_masters(flat)
    (segment,) = state.shards.segments
    own = flat[segment.start : segment.start + segment.length]
    for name in ("master", "ema_0.9", "ema_0.5"):
        assert torch.equal(state.shards.local(name), own)
