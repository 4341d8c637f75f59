"""Defines the trainings whose losses were recorded with the original code: network, weights, images, noise, times."""

from collections.abc import Iterator

import torch
from networks import random_weights, small_model
from torch import Tensor

from cmscale.config import CD, CT
from cmscale.rng import SampleRandomness

STEPS, TOTAL_STEPS, BATCH = 20, 1000, 8
RATE, AVERAGE = 1e-3, 0.95
METHODS = {
    "ct": CT(kind="ct", convention="released_code", distance="l2"),
    "cd": CD(kind="cd", teacher="t", distance="l2", target_ema=AVERAGE),
}
"""As in the original's scripts/launch.sh: CT from s0 = 2 to s1 = 150 with mu0 = 0.95, CD with N = 40 and mu = 0.95.

But with l2, and of 1,000 steps, so that CT's N(k) grows from 2 to 21 in the first 20."""
MODEL = small_model(image_size=8, attention_resolutions=(4,))


def first_weights() -> dict[str, Tensor]:
    """Of the student, its target and the teacher."""
    return random_weights(MODEL, seed=3)


def batches() -> Iterator[tuple[Tensor, SampleRandomness]]:
    """The images of each step in [-1, 1], and its randomness."""
    for step in range(STEPS):
        pixels = torch.rand(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1
        positions = tuple(range(BATCH * step, BATCH * (step + 1)))
        yield pixels, SampleRandomness(7, positions, torch.device("cpu"))
