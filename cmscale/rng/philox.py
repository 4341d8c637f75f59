"""Draws random numbers by a counter-based generator, for all samples of a batch at once, equal on every device.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): ten rounds of two
32-bit multiplications make four 32-bit words of a 128-bit counter and a 64-bit key. The key is the run's, the counter
is (block, position, purpose). Under one key no two counters are alike: samples, purposes and blocks share no words.

Words, masks and uniform numbers are integer arithmetic, equal to the bit on every device. Normal numbers are computed
in float64 and rounded to float32. Devices differ where the last digit of a logarithm, sine or cosine in float64 decides
between two neighbours in float32, which is to be expected once in hundreds of millions of numbers.

On CUDA the words are made by kernels of Triton if they run there, else, as on a CPU, by operations of torch.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF

TILE = 65536
"""Counters that a CPU works at: 512 KiB a tensor. Fewer are slower because of the calls, more because of the cache."""

Word = Tensor | int


def philox(counter: Sequence[Word], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter, int64 with the word in the lower half, whatever is in the upper one.

    Args:
        counter: Four 32-bit words, the first one int64 tensors that broadcast, or numbers.
        key: Two 32-bit words.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64 bits: the sign is one of them
        c0 = ((second >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(LOW)
        c2 = ((first >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(LOW)
        c1, c3 = second, first
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def normal(key: int, positions: Tensor, purpose: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, [B, *shape] float32, by the method of Box and Muller; at most 6.8 in size.

    Row i is a function of the other arguments and positions[i].

    Args:
        key: 0 to 2^64 - 1.
        positions: [B] int64, not negative.
        purpose: 0 to 2^31 - 1.
    """
    return _drawn(key, positions, purpose, shape, per_word=1, dtype=torch.float32, convert=_box_muller)


def kept(key: int, positions: Tensor, purpose: int, shape: Sequence[int], *, rate: float) -> Tensor:
    """A mask, [B, *shape] bool, false with probability `rate` to the nearest of 65,536 parts.

    Its arguments are those of `normal`.
    """
    threshold = min(round(rate * 65536), 65535) - 32768  # of halves of words, as signed numbers

    def convert(words: Tensor) -> Tensor:
        return words.view(torch.int16).view(*words.shape, 2) >= threshold

    if positions.is_cuda and _kernels_work(positions.device):
        from cmscale.rng import philox_kernel

        blocks = -(-math.prod(shape) // (4 * philox_kernel.PER_WORD))
        return _shaped(philox_kernel.kept(key, positions, purpose, blocks, threshold=threshold), shape)
    return _drawn(key, positions, purpose, shape, per_word=2, dtype=torch.bool, convert=convert)


def uniform(key: int, positions: Tensor, purpose: int) -> Tensor:
    """Uniform numbers on [0, 1), [B] float64, multiples of 2^-53. Its arguments are those of `normal`."""
    words = _words(key, positions, purpose, range(1)).to(torch.int64).bitwise_and_(LOW)
    upper, lower = words[:, 0, 0] >> 5, words[:, 1, 0] >> 6
    return (upper * 2**26 + lower).double() * 2.0**-53


def _drawn(
    key: int,
    positions: Tensor,
    purpose: int,
    shape: Sequence[int],
    *,
    per_word: int,
    dtype: torch.dtype,
    convert: Callable[[Tensor], Tensor],
) -> Tensor:
    """Numbers that `convert` makes of words, [b, 4, n] int32 -> [b, 4, n, per_word]."""
    count, device = math.prod(shape), positions.device
    if device.type == "meta":
        return torch.empty((len(positions), *shape), dtype=dtype, device=device)
    blocks = -(-count // (4 * per_word))
    numbers = torch.empty((len(positions), 4, blocks, per_word), dtype=dtype, device=device)
    width, height = (TILE, max(1, TILE // max(1, blocks))) if device.type == "cpu" else (blocks, len(positions))
    for row in range(0, len(positions), max(1, height)):
        rows = slice(row, row + height)
        for start in range(0, blocks, max(1, width)):
            columns = range(start, min(start + width, blocks))
            words = _words(key, positions[rows], purpose, columns)
            numbers[rows, :, columns.start : columns.stop] = convert(words)
    return _shaped(numbers, shape)


def _shaped(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """The first numbers of each row, [B, *shape]."""
    return numbers.flatten(1)[:, : math.prod(shape)].reshape(len(numbers), *shape)


def _box_muller(words: Tensor) -> Tensor:
    pairs = words.double().unflatten(1, (2, 2)) * 2.0**-32  # from -1/2 to below 1/2
    radius = (pairs[:, :, 0] + (0.5 + 2.0**-33)).log_().mul_(-2).sqrt_()
    angle = pairs[:, :, 1] * (2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1, 2)[..., None]


def _words(key: int, positions: Tensor, purpose: int, blocks: range) -> Tensor:
    """The words of these blocks, [B, 4, len(blocks)] int32."""
    if positions.is_cuda and _kernels_work(positions.device):
        from cmscale.rng import philox_kernel

        assert blocks.start == 0
        return philox_kernel.words(key, positions, purpose, len(blocks))
    return words_by_torch(key, positions, purpose, blocks)


def words_by_torch(key: int, positions: Tensor, purpose: int, blocks: range) -> Tensor:
    """The same by torch's own operations, about a hundred of them for a batch of any size."""
    index = torch.arange(blocks.start, blocks.stop, device=positions.device)
    position = positions[:, None]
    counter = (index[None], position & LOW, position >> 32, torch.full_like(position, purpose))
    words = torch.empty((len(positions), 4, len(blocks)), dtype=torch.int32, device=positions.device)
    for number, word in enumerate(philox(counter, (key & LOW, key >> 32))):
        words[:, number] = word
    return words


@cache
def _kernels_work(device: torch.device) -> bool:
    """Whether the kernels of Triton run on a device and draw what torch does; if not, the log says why."""
    key, positions, purpose, blocks = 2**62 + 5, torch.tensor([3, 2**40 + 1], device=device), 7, 300
    expected = words_by_torch(key, positions, purpose, range(blocks))
    try:
        from cmscale.rng import philox_kernel

        found = philox_kernel.words(key, positions, purpose, blocks)
        mask = philox_kernel.kept(key, positions, purpose, blocks, threshold=-9000)
    except Exception as error:  # no Triton, no C compiler for its launchers, a device that it does not know
        why = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    else:
        if torch.equal(found, expected) and torch.equal(mask.flatten(2), expected.view(torch.int16) >= -9000):
            return True
        why = "they draw other numbers"
    logging.getLogger(__name__).warning("%s draws random numbers without Triton's kernels (%s)", device, why)
    return False
