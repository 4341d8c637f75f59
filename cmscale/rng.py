"""Draws the random numbers of training: each is a function of (seed, sample position, purpose) and of nothing else.

They do not depend on rank, batch size or history, so a resumed run draws what an uninterrupted one does.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def key(*parts: int | str) -> int:
    """A 63-bit key of the parts; another part gives an unrelated key."""
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
    """Standard normal noise, [len(positions), *shape] float32; row i depends on (seed, positions[i], purpose) alone.

    On the meta device it has a shape and no values.
    """
    noise = torch.empty((len(positions), *shape), device=device)
    if noise.is_meta:
        return noise
    source = torch.Generator(device=device)
    for row, position in zip(noise, positions, strict=True):
        row.normal_(generator=source.manual_seed(key(seed, position, purpose)))
    return noise


@dataclass(frozen=True)
class SampleRandomness:
    """The random numbers of a training batch.

    Attributes:
        positions: the samples' places in the endless training sequence, one per sample.
    """

    seed: int
    positions: tuple[int, ...]
    device: torch.device

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal, [B, *shape] float32, on the device."""
        return normal_like_samples(self.seed, self.positions, shape, purpose="noise", device=self.device)

    def uniform(self) -> torch.Tensor:
        """Uniform on [0, 1), [B] float64, drawn on the CPU and moved to the device: the sample's training time."""
        drawn = [torch.rand((), dtype=torch.float64, generator=generator(self.seed, p, "time")) for p in self.positions]
        times = torch.stack(drawn)
        if self.device.type == "cuda":
            times = times.pin_memory()  # else the host would wait for the device at every copy
        return times.to(self.device, non_blocking=True)

    def dropout_keys(self) -> tuple[int, ...]:
        """One key per sample: networks called with the same keys drop the same elements (shared dropout)."""
        return tuple(key(self.seed, position, "dropout") for position in self.positions)

    def split(self, size: int) -> list["SampleRandomness"]:
        """The same numbers in micro-batches of `size` samples."""
        starts = range(0, len(self.positions), size)
        return [SampleRandomness(self.seed, self.positions[start : start + size], self.device) for start in starts]
