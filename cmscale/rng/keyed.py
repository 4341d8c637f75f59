"""Draws random numbers by torch's generators, each of which is seeded by what its numbers are for."""

import hashlib
from collections.abc import Sequence

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
    noise = torch.empty((len(positions), *shape), dtype=torch.float32, device=device)
    if noise.is_meta:
        return noise
    source = torch.Generator(device=device)
    for row, position in zip(noise, positions, strict=True):
        row.normal_(generator=source.manual_seed(key(seed, position, purpose)))
    return noise
