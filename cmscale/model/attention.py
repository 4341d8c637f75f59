"""Computes dot-product attention by xformers, PyTorch's SDPA or a float32 reference."""

import functools
import importlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from cmscale.errors import UserError

Kind = Literal["auto", "xformers", "sdpa", "reference"]
Layout = Literal["three_heads_dim", "heads_three_dim"]


def choose_attention(kind: Kind, device: torch.device) -> Literal["xformers", "sdpa", "reference"]:
    """The implementation that a call of `attend` takes on a device.

    `auto` is SDPA here: `cmscale.model.attention_choice` replaces it when a network is built.

    Raises:
        UserError: xformers is required but can't run here.
    """
    if kind == "auto":
        return "sdpa"
    if kind == "xformers" and device.type != "cuda":
        raise UserError(f"model.attention: xformers runs on CUDA only, not on {device.type}; use auto or sdpa")
    if kind == "xformers" and xformers_ops() is None:
        raise UserError("model.attention: xformers can't be imported here; install it, or use auto or sdpa")
    return kind


@functools.cache
def xformers_ops() -> Any:
    """xformers.ops, or None if it can't be imported. Imported only when needed, as that takes seconds."""
    try:
        return importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError):
        return None


def split_qkv(qkv: Tensor, *, num_heads: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a projection [B, 3 heads dim, S] into queries, keys and values, each [B, S, heads, dim].

    The released consistency models order its channels as `three_heads_dim`, older guided-diffusion weights as
    `heads_three_dim`.
    """
    batch, width, length = qkv.shape
    dim = width // (3 * num_heads)
    if layout == "three_heads_dim":
        parts = qkv.reshape(batch, 3, num_heads, dim, length).permute(1, 0, 4, 2, 3)
    else:
        parts = qkv.reshape(batch, num_heads, 3, dim, length).permute(2, 0, 4, 1, 3)
    query, key, value = parts.contiguous().unbind(0)
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, *, kind: Kind = "auto") -> Tensor:
    """softmax(q k^T / sqrt(dim)) v, each [B, S, heads, dim], in the inputs' dtype.

    Raises:
        UserError: see `choose_attention`.
    """
    chosen = choose_attention(kind, query.device)
    # The fast kernels have no forward-mode derivative. Compiled code is never differentiated that way.
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(query).tangent is not None:
        chosen = "reference"
    if chosen == "xformers":
        return xformers_ops().memory_efficient_attention(query, key, value)
    if chosen == "sdpa":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if query.is_meta:  # there torch takes the definition; CPU and CUDA have a kernel that stores no scores
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0].transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return reference_attention(query, key, value)


def reference_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by its definition, computed in float32; the tests compare the other two with it."""
    scale = query.shape[-1] ** -0.25  # on both factors, so that neither overflows unless the product does
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float() * scale, key.float() * scale)
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value.float()).to(query.dtype)
