"""Owns randomness: every number drawn in training is a function of (seed, sample position, what it is for) alone.

So it depends on no rank, no batch size and no history, and a resumed run draws what an uninterrupted one would.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def key(*parts: int | str) -> int:
    """A 63-bit key of its parts: any change of a part gives an unrelated key."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `key(*parts)`."""
    return torch.Generator(device=device).manual_seed(key(*parts))


def normal_like_samples(
    seed: int,
    positions: Sequence[int],
    shape: Sequence[int],
    *,
    purpose: str,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal noise, [len(positions), *shape] float32; row i depends on (seed, positions[i], purpose) alone."""
    noise = torch.empty((len(positions), *shape), device=device)
    source = torch.Generator(device=device)
    for row, position in zip(noise, positions, strict=True):
        row.normal_(generator=source.manual_seed(key(seed, position, purpose)))
    return noise


@dataclass(frozen=True)
class SampleRandomness:
    """The random numbers of the samples at `positions` (their places in the endless training sequence)."""

    seed: int
    positions: tuple[int, ...]
    device: torch.device

    def noise(self, shape: Sequence[int], purpose: str = "noise") -> torch.Tensor:
        """Standard normal, [B, *shape] float32, on the device."""
        return normal_like_samples(self.seed, self.positions, shape, purpose=purpose, device=self.device)

    def uniform(self, purpose: str = "time") -> torch.Tensor:
        """Uniform on [0, 1), [B] float64, drawn on the CPU and moved to the device."""
        drawn = [
            torch.rand((), dtype=torch.float64, generator=generator(self.seed, p, purpose)) for p in self.positions
        ]
        return torch.stack(drawn).to(self.device)

    def dropout_keys(self) -> tuple[int, ...]:
        """One key a sample: networks given the same keys drop the same elements (shared dropout)."""
        return tuple(key(self.seed, position, "dropout") for position in self.positions)

    def split(self, size: int) -> list["SampleRandomness"]:
        """The same numbers in micro-batches of `size` samples."""
        starts = range(0, len(self.positions), size)
        return [SampleRandomness(self.seed, self.positions[start : start + size], self.device) for start in starts]
