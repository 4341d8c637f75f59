"""Randomness: each sample's numbers depend on (seed, position, purpose), and on nothing else."""

from collections.abc import Iterable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cmscale.model.blocks import mask
from cmscale.rng import Generator, key, normal_like_samples, sample_randomness

CPU = torch.device("cpu")
GENERATORS = pytest.mark.parametrize("by", get_args(Generator))


def randomness(by: Generator, seed: int, positions: Iterable[int]):
    return sample_randomness(by, seed=seed, positions=tuple(positions), device=CPU)


@GENERATORS
@settings(max_examples=15)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_sample_draws_the_same_whatever_its_batch(by: Generator, order: list[int], size: int) -> None:
    whole = randomness(by, 7, range(6))
    noise, times = whole.noise((2, 3)), whole.uniform()
    kept = mask((6, 2, 9), 0.4, keys=whole.dropout_keys(), layer=3, device=CPU)
    parts = randomness(by, 7, order).split(size)
    assert [position for part in parts for position in part.positions] == order
    for part in parts:
        rows = list(part.positions)
        assert torch.equal(part.noise((2, 3)), noise[rows])
        assert torch.equal(part.uniform(), times[rows])
        shape = (len(rows), 2, 9)
        assert torch.equal(mask(shape, 0.4, keys=part.dropout_keys(), layer=3, device=CPU), kept[rows])


def test_seed_position_and_purpose_each_give_other_numbers() -> None:
    drawn = [
        normal_like_samples(seed, [position], (8,), purpose=purpose)
        for seed in (0, 1)
        for position in (0, 1)
        for purpose in ("noise", "start")
    ]
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == len(drawn)


@GENERATORS
def test_every_number_of_a_sample_changes_with_the_seed_and_with_the_position(by: Generator) -> None:
    def numbers(seed: int, position: int) -> tuple:
        random = randomness(by, seed, [position])
        kept = mask((1, 64), 0.5, keys=random.dropout_keys(), layer=0, device=CPU)
        return tuple(random.noise((8,)).flatten().tolist()), random.uniform().item(), tuple(kept.flatten().tolist())

    drawn = [numbers(seed, position) for seed in (0, 1) for position in (0, 1)]
    for kind in range(3):
        assert len({one[kind] for one in drawn}) == len(drawn)


@GENERATORS
def test_every_layer_has_a_mask_of_its_own(by: Generator) -> None:
    keys = randomness(by, 0, [5]).dropout_keys()
    masks = {tuple(mask((1, 64), 0.5, keys=keys, layer=layer, device=CPU)[0].tolist()) for layer in range(20)}
    assert len(masks) == 20


def test_keys_tell_their_parts_apart() -> None:
    assert len({key(1, 23), key(12, 3), key("1", 23), key(1, 23, ""), key(123)}) == 5


@GENERATORS
def test_noise_over_samples_is_standard_normal_and_times_are_uniform(by: Generator) -> None:
    random = randomness(by, 3, range(4000))
    assert stats.kstest(random.noise((4,)).flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(random.uniform().numpy(), "uniform").pvalue > 0.01
