"""Owns what a config will cost before it is run: parameters, memory of a rank, FLOP, time."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmscale.config import Config, Method, accumulation_steps
from cmscale.model.unet import build_unet

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30


def num_parameters(config: Config) -> int:
    """The network's parameters, counted without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_unet(config.model).parameters())


def forward_flop(config: Config) -> int:
    """FLOP of one forward pass of one image (a multiplication and an addition are two)."""
    size = config.model.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        labels = None if config.model.num_classes is None else torch.zeros(1, dtype=torch.long)
        build_unet(config.model)(torch.zeros(1, 3, size, size), torch.zeros(1), labels=labels)
    return counter.get_total_flops()


def passes(method: Method) -> float:
    """Forward passes' worth of one training image: a backward pass is two, target and teacher one each use."""
    match method.kind:
        case "edm":
            return 3
        case "cd":
            return 4 + (2 if method.solver == "heun" else 1)
        case "sct" | "scd":  # a forward pass with its derivative costs two
            return 5 + (method.kind == "scd")
        case "pd":
            return 5
        case _:
            return 4


def estimates(config: Config, *, num_ranks: int, tflops: float) -> list[tuple[str, str]]:
    """Rows of (what, estimate) for `num_ranks` GPUs that sustain `tflops` each."""
    count, low = num_parameters(config), BYTES[config.engine.precision]
    stage, copies = config.engine.zero_stage, len(config.ema.rates)
    has_target = config.method.kind in ("cd", "ct", "pd")
    masters = 3 * 4 + 4 * copies + 4 * has_target  # fp32 weights and two moments, shadows
    share = num_ranks if stage >= 1 else 1
    networks = 1 + has_target + (config.method.kind in ("cd", "scd"))
    weights = networks * low * count / (num_ranks if stage == 3 else 1)
    gradients = low * count / (num_ranks if stage >= 2 else 1)
    states = masters * count / share
    flop = forward_flop(config)
    image_flop = flop * passes(config.method)
    images = config.train.total_steps * config.train.global_batch_size
    days = images * image_flop / (num_ranks * tflops * 1e12) / 86400
    return [
        ("parameters", f"{count / 1e6:.1f} M"),
        ("ranks, micro-batch, accumulation", _batch(config, num_ranks)),
        ("weights of a rank", f"{weights / GIB:.2f} GiB ({networks} networks, {config.engine.precision})"),
        ("gradients of a rank", f"{gradients / GIB:.2f} GiB"),
        (
            "fp32 states of a rank",
            f"{states / GIB:.2f} GiB (master, two moments, {copies} EMA{', target' * has_target})",
        ),
        ("forward pass", f"{flop / 1e12:.3g} TFLOP an image"),
        ("training", f"{image_flop / 1e12:.3g} TFLOP an image, {images:,} images"),
        ("a checkpoint", f"{masters * count / GIB:.2f} GiB"),
        ("time", f"{days:.3g} days at {tflops:g} TFLOP/s a GPU (an assumption: measure yours)"),
    ]


def _batch(config: Config, num_ranks: int) -> str:
    accumulation = accumulation_steps(config, num_ranks=num_ranks)
    return f"{num_ranks}, {config.train.micro_batch_size}, {accumulation}"
