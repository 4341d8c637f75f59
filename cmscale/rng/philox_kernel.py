"""Computes the words and masks of `cmscale.rng.philox` by kernels of Triton, which PyTorch for CUDA comes with."""

import contextlib
from typing import Any

import torch
import triton  # pyright: ignore
import triton.language as tl  # pyright: ignore
from torch import Tensor

WIDTH = 512
PER_WORD = 2  # elements of a mask


@triton.jit
def _block(positions, key, purpose, WIDTH: tl.constexpr):  # pyright: ignore
    """Row, blocks and their four words in program (i, row): blocks i WIDTH to (i + 1) WIDTH of one sample."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    position = tl.load(positions + row)
    none = tl.zeros((WIDTH,), tl.int32)
    low, high = none + position.to(tl.int32), none + (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(key, block, low, high, none + purpose)
    return row, block, w0, w1, w2, w3


@triton.jit(do_not_specialize=["key", "purpose"])
def _words(out, positions, key, purpose, blocks, WIDTH: tl.constexpr):  # pyright: ignore
    row, block, w0, w1, w2, w3 = _block(positions, key, purpose, WIDTH)
    place, valid = out + row * 4 * blocks + block, block < blocks
    tl.store(place, w0.to(tl.int32, bitcast=True), mask=valid)
    tl.store(place + blocks, w1.to(tl.int32, bitcast=True), mask=valid)
    tl.store(place + 2 * blocks, w2.to(tl.int32, bitcast=True), mask=valid)
    tl.store(place + 3 * blocks, w3.to(tl.int32, bitcast=True), mask=valid)


@triton.jit
def _pair(word, threshold):  # pyright: ignore
    """Whether the lower and the upper half of a word, as signed numbers, reach the threshold: two bytes, 0 or 1."""
    word = word.to(tl.int32, bitcast=True)
    lower, upper = (word << 16) >> 16, word >> 16
    return ((lower >= threshold).to(tl.int32) + (upper >= threshold).to(tl.int32) * 256).to(tl.int16)


@triton.jit(do_not_specialize=["key", "purpose", "threshold"])
def _kept(out, positions, key, purpose, threshold, blocks, WIDTH: tl.constexpr):  # pyright: ignore
    row, block, w0, w1, w2, w3 = _block(positions, key, purpose, WIDTH)
    place, valid = out + row * 4 * blocks + block, block < blocks
    tl.store(place, _pair(w0, threshold), mask=valid)
    tl.store(place + blocks, _pair(w1, threshold), mask=valid)
    tl.store(place + 2 * blocks, _pair(w2, threshold), mask=valid)
    tl.store(place + 3 * blocks, _pair(w3, threshold), mask=valid)


def words(key: int, positions: Tensor, purpose: int, blocks: int) -> Tensor:
    """The words of blocks 0 to `blocks` - 1 of each position, [B, 4, blocks] int32."""
    out = torch.empty((len(positions), 4, blocks), dtype=torch.int32, device=positions.device)
    _launch(_words, out, positions, key, purpose)
    return out


def kept(key: int, positions: Tensor, purpose: int, blocks: int, *, threshold: int) -> Tensor:
    """Whether the halves of these words, as signed numbers, reach a threshold: [B, 4, blocks, 2] bool."""
    out = torch.empty((len(positions), 4, blocks), dtype=torch.int16, device=positions.device)
    _launch(_kept, out, positions, key, purpose, threshold)
    return out.view(torch.bool).view(*out.shape, PER_WORD)


def _launch(kernel: Any, out: Tensor, positions: Tensor, *numbers: int) -> None:
    rows, _, blocks = out.shape
    if out.numel():
        with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
            kernel[(triton.cdiv(blocks, WIDTH), rows)](out, positions, *numbers, blocks, WIDTH=WIDTH)
