"""Randomness: each sample's numbers depend on (seed, position, purpose), and on nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmscale.rng import SampleRandomness, key, normal_like_samples

CPU = torch.device("cpu")


@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_sample_draws_the_same_whatever_its_batch(order: list[int], size: int) -> None:
    whole = SampleRandomness(7, tuple(range(6)), CPU)
    noise, times, keys = whole.noise((2, 3)), whole.uniform(), whole.dropout_keys()
    parts = SampleRandomness(7, tuple(order), CPU).split(size)
    assert [position for part in parts for position in part.positions] == order
    for part in parts:
        rows = list(part.positions)
        assert torch.equal(part.noise((2, 3)), noise[rows])
        assert torch.equal(part.uniform(), times[rows])
        assert part.dropout_keys() == tuple(keys[row] for row in rows)


def test_seed_position_and_purpose_each_give_other_numbers() -> None:
    drawn = [
        normal_like_samples(seed, [position], (8,), purpose=purpose)
        for seed in (0, 1)
        for position in (0, 1)
        for purpose in ("noise", "start")
    ]
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == len(drawn)


def test_every_number_of_a_sample_changes_with_the_seed_and_with_the_position() -> None:
    def numbers(seed: int, position: int) -> tuple:
        random = SampleRandomness(seed, (position,), CPU)
        return tuple(random.noise((8,)).flatten().tolist()), random.uniform().item(), random.dropout_keys()

    drawn = [numbers(seed, position) for seed in (0, 1) for position in (0, 1)]
    for kind in range(3):
        assert len({one[kind] for one in drawn}) == len(drawn)


def test_keys_tell_their_parts_apart() -> None:
    assert len({key(1, 23), key(12, 3), key("1", 23), key(1, 23, ""), key(123)}) == 5


def test_noise_over_samples_is_standard_normal_and_times_are_uniform() -> None:
    random = SampleRandomness(3, tuple(range(4000)), CPU)
    assert stats.kstest(random.noise((4,)).flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(random.uniform().numpy(), "uniform").pvalue > 0.01
