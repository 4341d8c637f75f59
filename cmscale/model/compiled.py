"""Compiles the blocks of a network for training (`model.compile: blocks`), and refuses what can't be compiled.

One function per class of block is compiled, for each shape, dtype and gradient mode that its blocks meet. Blocks of
equal shape share one. Parameters keep their names. What the shapes of training do not cover (samples, probes) is
computed without compiled code: see `uncompiled`.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from cmscale.errors import UserError
from cmscale.model.blocks import AttentionBlock, Block, ResBlock

VARIANTS = 512
"""Of one class: sizes and channels of its blocks (two dozen in the LSUN network) times student, target and teacher."""


def check_compiler(device: torch.device) -> None:
    """Checks that torch.compile has what it needs on a device.

    Raises:
        UserError: there is no compiler of C++, or on CUDA no Triton.
    """
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise UserError("model.compile: blocks needs a compiler of C++, and none is found; install g++, or use off")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("model.compile: blocks needs Triton on CUDA, and it is not installed; install it, or use off")


def compile_blocks(network: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Makes the residual and attention blocks of a network compute with compiled functions.

    Attention by xformers stays as it is: its kernels are opaque to the compiler.

    Args:
        backend: Of torch.compile; tests take one that counts.
    """
    # One of torch's public settings. At its default, 8, the ninth kind of block would run without compiled code.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 2 * VARIANTS
    )
    compiled: dict[type[Block], Callable[..., torch.Tensor]] = {
        kind: torch.compile(kind._body, backend=backend, dynamic=False, fullgraph=True) for kind in KINDS
    }
    for block in network.modules():
        if isinstance(block, Block) and not (isinstance(block, AttentionBlock) and block.kind == "xformers"):
            block.use_compiled(compiled[type(block)])


def uncompiled() -> AbstractContextManager[Any]:
    """Computes the block without compiled code, and compiles nothing for its shapes."""
    return torch.compiler.set_stance("force_eager")


KINDS = (ResBlock, AttentionBlock)
