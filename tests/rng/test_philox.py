"""Philox: the published numbers, the same on any batch and device, independent of each other."""

import importlib.util
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from cmscale.rng import PhiloxRandomness, philox

CPU = torch.device("cpu")
KEY = 0x7EDCBA9876543210
CHECKOUT = Path(__file__).parents[2]
TIMES = [0.8647620278021005, 0.28637920799479644]
NOISE = [
    [-0.62818265, 0.96369356, 0.3907724, -0.2174941, 1.4667602, 2.532948],
    [1.1312729, 0.07189557, -2.4519062, 2.0523884, -0.94615555, 0.7031901],
]
MASKS = ["195ffbd3", "ffb03c79"]


def at(*positions: int) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_words_are_those_that_random123_publishes(counter: tuple, key: tuple, words: str) -> None:
    assert [int(word) & 0xFFFFFFFF for word in philox.philox(counter, key)] == [int(word, 16) for word in words.split()]


def test_a_word_is_that_of_its_block_position_and_purpose() -> None:
    positions = (5, 2**32, 2**62 + 7)
    words = philox.words_by_torch(KEY, at(*positions), 9, range(3, 7))
    for row, position in enumerate(positions):
        for column, block in enumerate(range(3, 7)):
            counter = (block, position % 2**32, position >> 32, 9)
            expected = [int(word) & 0xFFFFFFFF for word in philox.philox(counter, (KEY % 2**32, KEY >> 32))]
            assert [int(word) % 2**32 for word in words[row, :, column]] == expected


def test_the_numbers_of_a_run_stay_what_they_are() -> None:
    """Runs are resumed by later releases: whatever else changes, these must not."""
    random = PhiloxRandomness(7, (0, 123456789012), CPU)
    assert random.uniform().tolist() == TIMES
    np.testing.assert_allclose(random.noise((2, 3)).flatten(1).numpy(), NOISE, rtol=3e-7)
    mask = random.dropout_keys().kept((4, 8), 0.3, layer=5)
    assert [np.packbits(row.numpy()).tobytes().hex() for row in mask] == MASKS


def test_no_number_depends_on_the_tiles_that_a_cpu_works_in(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, shape = at(0, 3, 2**40, 11, 12), (3, 7, 5)
    normal, kept = philox.normal(KEY, positions, 0, shape), philox.kept(KEY, positions, 0, shape, rate=0.4)
    for tile in (1, 10, 27, 60):  # a sample has 27 blocks of normal numbers, and 14 of the mask
        monkeypatch.setattr(philox, "TILE", tile)
        assert torch.equal(philox.normal(KEY, positions, 0, shape), normal)
        assert torch.equal(philox.kept(KEY, positions, 0, shape, rate=0.4), kept)


def test_normal_numbers_are_box_and_mullers_of_their_words() -> None:
    words = philox.words_by_torch(KEY, at(4), 1, range(500))[0].numpy().astype(np.float64)
    radius = np.sqrt(-2 * np.log((words[0::2] + 2**31 + 0.5) / 2**32))
    angle = 2 * np.pi * words[1::2] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    found = philox.normal(KEY, at(4), 1, (2000,))[0].numpy()
    np.testing.assert_array_max_ulp(found, expected.astype(np.float32), maxulp=1)


def test_normal_numbers_have_the_moments_and_the_distribution_of_the_normal_one() -> None:
    numbers = philox.normal(KEY, torch.arange(50), 0, (20_000,)).double().flatten()
    count = len(numbers)
    for power, mean in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        variance = math.prod(range(2 * power - 1, 0, -2)) - mean**2
        assert abs((numbers**power).mean().item() - mean) < 4 * math.sqrt(variance / count)
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 0.01
    assert 4.5 < numbers.abs().max() < math.sqrt(2 * 33 * math.log(2))


def test_numbers_of_other_places_samples_and_purposes_do_not_go_together() -> None:
    by_purpose = torch.stack([philox.normal(KEY, torch.arange(40), purpose, (500,)) for purpose in range(4)]).double()
    pairs = {
        "purposes": (by_purpose[:-1], by_purpose[1:]),
        "samples": (by_purpose[:, :-1], by_purpose[:, 1:]),
        "places": (by_purpose[..., :-1], by_purpose[..., 1:]),
        "lanes": (by_purpose[..., :375], by_purpose[..., 125:]),  # 125 blocks: words of one counter
        "keys": (by_purpose[0], philox.normal(KEY + 1, torch.arange(40), 0, (500,)).double()),
    }
    for name, (one, other) in pairs.items():
        for power in (1, 2):  # of squares too: radius and angle of one pair share nothing
            a, b = (x**power - (x**power).mean() for x in (one, other))
            correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
            assert abs(correlation) < 4 / math.sqrt(a.numel()), (name, power)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_masks_drop_at_their_rate_and_independently(rate: float) -> None:
    layers = [philox.kept(KEY, torch.arange(30), layer, (64, 101), rate=rate) for layer in (2, 3)]
    count = layers[0].numel()
    for mask in layers:
        assert abs((~mask).double().mean().item() - rate) <= 4 * math.sqrt(rate * (1 - rate) / count) + 2**-17
    both = (~layers[0] & ~layers[1]).double().mean().item()
    assert abs(both - rate**2) <= 4 * math.sqrt(rate**2 * (1 - rate**2) / count) + 2**-16
    neighbours = (~layers[0][..., 1:] & ~layers[0][..., :-1]).double().mean().item()  # halves of a word
    assert abs(neighbours - rate**2) <= 5 * math.sqrt(rate**2 * (1 - rate**2) / count) + 2**-16


def test_times_are_uniform() -> None:
    times = philox.uniform(KEY, torch.arange(20_000), 1)
    assert (times.dtype, float(times.min()) >= 0, float(times.max()) < 1) == (torch.float64, True, True)
    assert stats.kstest(times.numpy(), "uniform").pvalue > 0.01
    assert torch.equal(times * 2**53, (times * 2**53).round())


class Calls(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_batch_takes_as_many_operations_as_a_sample() -> None:
    counts = []
    for size in (1, 32):
        random = PhiloxRandomness(0, tuple(range(size)), CPU)
        with Calls() as calls:
            random.noise((3, 16, 16))
            random.uniform()
            random.dropout_keys().kept((8, 16, 16), 0.2, layer=0)
        counts.append(calls.count)
    assert counts[0] == counts[1] < 500


def test_on_the_meta_device_numbers_have_shapes_alone() -> None:
    random = PhiloxRandomness(0, (1, 2), torch.device("meta"))
    found = (random.noise((3, 4)), random.uniform(), random.dropout_keys().kept((5,), 0.1, layer=0))
    assert [(each.is_meta, tuple(each.shape), each.dtype) for each in found] == [
        (True, (2, 3, 4), torch.float32),
        (True, (2,), torch.float64),
        (True, (2, 5), torch.bool),
    ]


def test_an_empty_batch_and_an_empty_shape_give_nothing() -> None:
    assert philox.normal(KEY, at(), 0, (3,)).shape == (0, 3)
    assert philox.kept(KEY, at(1), 0, (0, 2), rate=0.1).shape == (1, 0, 2)


INTERPRETED = """
import torch
from cmscale.rng import philox, philox_kernel
for key, purpose, blocks in ((16, 1, 1), (2**63 - 1, 2000, 513)):
    positions = torch.tensor([0, 2**31, 2**62 + 7])
    expected = philox.words_by_torch(key, positions, purpose, range(blocks))
    assert torch.equal(philox_kernel.words(key, positions, purpose, blocks), expected)
    for threshold in (-9000, 32767):
        mask = philox_kernel.kept(key, positions, purpose, blocks, threshold=threshold)
        assert torch.equal(mask.flatten(2), expected.view(torch.int16) >= threshold)
print("equal")
"""


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_kernels_of_cuda_draw_the_same_as_tritons_interpreter_runs_them() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


def test_where_the_kernels_do_not_run_the_log_says_why_and_torch_draws(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not philox._kernels_work.__wrapped__(CPU)
    assert "cpu draws random numbers without Triton's kernels (" in caplog.text
