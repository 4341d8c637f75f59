"""Chooses the attention of a run at its start, by trying what is installed: what is right, and of that what is faster.

That a package can be imported says little: xformers imports where none of its kernels runs. So `model.attention: auto`
runs one attention of the network's own shape, forward and backward, with every candidate.
"""

import functools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cmscale.config import Model
from cmscale.model.attention import attend, choose_attention, reference_attention, xformers_ops

Chosen = Literal["xformers", "sdpa", "reference"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Largest difference to the reference in float32, relative to its norm; of gradients four times as much.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GAIN = 1.03  # by which another kernel must be faster than SDPA
BATCH = 2
ROUNDS = 5
REPEATS = 10


@dataclass(frozen=True)
class Choice:
    """An implementation of attention, why it was taken, in one line, and the kernel behind it where that is known."""

    kind: Chosen
    why: str
    kernel: str = ""

    def __str__(self) -> str:
        return f"{self.kernel or self.kind}: {self.why}"


@dataclass(frozen=True)
class Shape:
    """The shape of an attention: [BATCH, length, heads, dim]."""

    length: int
    heads: int
    dim: int


def largest_attention(model: Model) -> Shape:
    """The attention over the most positions of a network; the middle block attends at the smallest size."""
    last = len(model.channel_multipliers) - 1
    levels = [n for n in range(last) if model.image_size >> n in model.attention_resolutions]
    level = levels[0] if levels else last
    width = model.channels * model.channel_multipliers[level]
    return Shape((model.image_size >> level) ** 2, width // model.head_channels, model.head_channels)


def choose(model: Model, device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation for a network on a device, in the dtype that it computes in.

    Raises:
        UserError: `model.attention` asks for one that can't run here.
    """
    if model.attention != "auto":
        return Choice(choose_attention(model.attention, device), "model.attention")
    if device.type != "cuda":
        return Choice("sdpa", f"the fused kernel of PyTorch on {device.type}")
    return try_out(largest_attention(model), device, dtype)


@functools.lru_cache(maxsize=16)
def try_out(shape: Shape, device: torch.device, dtype: torch.dtype) -> Choice:
    """Tries xformers against SDPA on a GPU."""
    candidates: dict[Chosen, Attend] = {"sdpa": functools.partial(attend, kind="sdpa")}
    operators = quietly(xformers_ops)
    if operators is not None:
        candidates["xformers"] = functools.partial(attend, kind="xformers")
    choice = best(candidates, shape, device, dtype)
    return choice if operators is not None else Choice("sdpa", "xformers can't be imported")


def best(candidates: Mapping[Chosen, Attend], shape: Shape, device: torch.device, dtype: torch.dtype) -> Choice:
    """The fastest of the candidates that agree with the reference; `sdpa` unless another is clearly faster."""
    expected = _run(reference_attention, _inputs(shape, device, torch.float32))
    problems: dict[str, str] = {}
    right: dict[Chosen, Attend] = {}
    for name, candidate in candidates.items():
        try:
            found = _run(candidate, _inputs(shape, device, dtype))
        except Exception as error:  # a kernel that is not built for this GPU, dtype or shape
            problems[name] = f"{name} does not run ({type(error).__name__}: {_first_line(error)})"
            continue
        wrong = _difference(found, expected, tolerance=TOLERANCES[dtype])
        if wrong is None:
            right[name] = candidate
        else:
            problems[name] = f"{name} is wrong ({wrong})"
    if not right:
        return Choice("reference", "; ".join(problems.values()))
    seconds = _timed(right, _inputs(shape, device, dtype), device)
    fastest = min(seconds, key=seconds.__getitem__)
    if "sdpa" in seconds and seconds["sdpa"] < GAIN * seconds[fastest]:
        fastest = "sdpa"
    speeds = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in seconds.items())
    at = f"{shape.length} positions, {shape.heads} heads of {shape.dim}, {str(dtype).removeprefix('torch.')}"
    return Choice(fastest, "; ".join([f"{speeds} ({at}, forward and backward)", *problems.values()]))


def kernel_name(choice: Choice, shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The kind and, of xformers, the kernel behind it."""
    if choice.kind != "xformers":
        return choice.kind
    try:
        from xformers.ops.fmha import Inputs
        from xformers.ops.fmha.dispatch import _dispatch_fw

        query, key, value = _inputs(shape, device, dtype)
        return f"xformers ({_dispatch_fw(Inputs(query, key, value), True).NAME})"
    except Exception:  # private parts of xformers; the name serves the reader alone
        return "xformers"


def quietly(action: Callable[[], Any]) -> Any:
    """Runs an import without the lines that xformers prints where it was built for another torch.

    What they announce, that its own kernels are missing, is found out by running them.
    """
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    finally:
        logger.setLevel(level)


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, the same numbers in every dtype."""
    source = torch.Generator().manual_seed(0)
    sizes = (BATCH, shape.length, shape.heads, shape.dim)
    with torch.inference_mode(False):
        drawn = [torch.randn(sizes, generator=source).half().to(device=device, dtype=dtype) for _ in range(3)]
        return [tensor.requires_grad_() for tensor in drawn]


def _run(candidate: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the three gradients of its weighted sum, float32."""
    with torch.inference_mode(False), torch.enable_grad():
        output = candidate(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
        gradients = torch.autograd.grad((output.float() * weights).sum(), inputs)
    return [tensor.detach().float() for tensor in (output, *gradients)]


def _difference(found: list[Tensor], expected: list[Tensor], *, tolerance: float) -> str | None:
    """What is too far from the reference; None if nothing is."""
    for number, (name, one, other) in enumerate(
        zip(("output", "query's gradient", "key's gradient", "value's gradient"), found, expected, strict=True)
    ):
        relative = float((one - other).norm() / other.norm())
        if not relative <= tolerance * (4 if number else 1):  # also if it is NaN
            return f"{name} differs by {relative:.2g}"
    return None


def _timed(candidates: Mapping[Chosen, Attend], inputs: list[Tensor], device: torch.device) -> dict[Chosen, float]:
    """Median seconds of forward and backward, in interleaved rounds."""
    found: dict[Chosen, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, candidate in candidates.items():
            _wait(device)
            began = time.perf_counter()
            for _ in range(REPEATS if device.type == "cuda" else 1):
                with torch.inference_mode(False), torch.enable_grad():
                    output = candidate(*inputs)
                    torch.autograd.grad(output.sum(), inputs)
            _wait(device)
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:120]
