"""Draws the random numbers of training: each is a function of (seed, sample position, purpose) and of nothing else.

They do not depend on rank, batch size or history, so a resumed run draws what an uninterrupted one does.
"""

from cmscale.rng.keyed import generator, key, normal_like_samples
from cmscale.rng.samples import (
    DropoutKeys,
    Generator,
    PhiloxKeys,
    PhiloxRandomness,
    SampleRandomness,
    sample_randomness,
)

__all__ = [
    "DropoutKeys",
    "Generator",
    "PhiloxKeys",
    "PhiloxRandomness",
    "SampleRandomness",
    "generator",
    "key",
    "normal_like_samples",
    "sample_randomness",
]
