"""Defines the random numbers of a training batch, by the generator that the run was started with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from cmscale.rng import philox
from cmscale.rng.keyed import generator, key, normal_like_samples

Generator = Literal["philox", "torch"]
"""`train.random_numbers`. Of `torch`, with which older runs began, noise and masks differ between CPU and CUDA."""

NOISE, TIME, DROPOUT = 0, 1, 2
"""What a number of Philox is for, in its counter. Layer l drops by DROPOUT + l."""


@dataclass(frozen=True)
class SampleRandomness:
    """The random numbers of a training batch, by torch's generator: one is seeded for each sample and purpose.

    Attributes:
        positions: the samples' places in the endless training sequence, one per sample.
    """

    seed: int
    positions: tuple[int, ...]
    device: torch.device

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Standard normal, [B, *shape] float32, on the device."""
        return normal_like_samples(self.seed, self.positions, shape, purpose="noise", device=self.device)

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), [B] float64, drawn on the CPU and moved to the device: the sample's training time."""
        drawn = [torch.rand((), dtype=torch.float64, generator=generator(self.seed, p, "time")) for p in self.positions]
        return _moved(torch.stack(drawn), self.device)

    def dropout_keys(self) -> "DropoutKeys":
        """One key per sample: networks called with the same keys drop the same elements (shared dropout)."""
        return tuple(key(self.seed, position, "dropout") for position in self.positions)

    def split(self, size: int) -> list[Self]:
        """The same numbers in micro-batches of `size` samples."""
        starts = range(0, len(self.positions), size)
        return [replace(self, positions=self.positions[start : start + size]) for start in starts]


@dataclass(frozen=True)
class PhiloxKeys:
    """What the numbers of a batch depend on by Philox: the run's key, and the samples' positions."""

    key: int
    positions: tuple[int, ...]
    device: torch.device

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def on_device(self) -> Tensor:
        """The positions, [B] int64."""
        return _moved(torch.tensor(self.positions, dtype=torch.int64), self.device)

    def kept(self, shape: Sequence[int], rate: float, *, layer: int) -> Tensor:
        """Which elements a layer keeps, [B, *shape] bool."""
        return philox.kept(self.key, self.on_device, DROPOUT + layer, shape, rate=rate)


@dataclass(frozen=True)
class PhiloxRandomness(SampleRandomness):
    """The random numbers of a training batch by Philox: all samples at once, and the same ones on every device."""

    def noise(self, shape: Sequence[int]) -> Tensor:
        return philox.normal(self._keys.key, self._keys.on_device, NOISE, shape)

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), [B] float64, on the device: the sample's training time."""
        return self._times

    def dropout_keys(self) -> PhiloxKeys:
        return self._keys

    @cached_property
    def _keys(self) -> PhiloxKeys:
        return PhiloxKeys(key(self.seed, "philox"), self.positions, self.device)

    @cached_property
    def _times(self) -> Tensor:
        return philox.uniform(self._keys.key, self._keys.on_device, TIME)


DropoutKeys = Sequence[int] | PhiloxKeys
"""What the masks of a batch's samples depend on."""


def sample_randomness(by: Generator, *, seed: int, positions: Sequence[int], device: torch.device) -> SampleRandomness:
    """The random numbers of the samples at these positions of a run."""
    kind = PhiloxRandomness if by == "philox" else SampleRandomness
    return kind(seed, tuple(positions), device)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device. On CUDA the host would wait at every copy that is not pinned."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
