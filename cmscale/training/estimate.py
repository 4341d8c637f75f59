"""Estimates the cost of a config before it is run: parameters, memory per rank, FLOP, time."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmscale.config import Config, accumulation_steps
from cmscale.model.unet import build_unet

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30


def num_parameters(config: Config) -> int:
    """The network's parameters, counted without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_unet(config.model).parameters())


def forward_flop(config: Config) -> int:
    """FLOP of a forward pass per image (a multiplication and an addition count as two)."""
    size = config.model.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        labels = None if config.model.num_classes is None else torch.zeros(1, dtype=torch.long)
        build_unet(config.model)(torch.zeros(1, 3, size, size), torch.zeros(1), labels=labels)
    return counter.get_total_flops()


def estimates(config: Config, *, num_ranks: int, tflops: float) -> list[tuple[str, str]]:
    """Rows of (what, estimate) for `num_ranks` GPUs that sustain `tflops` each."""
    count, low = num_parameters(config), BYTES[config.engine.precision]
    stage, copies = config.engine.zero_stage, len(config.ema.rates) + len(config.ema.lengths)
    facts = config.method.facts
    masters = 3 * 4 + 4 * copies + 4 * facts.has_target  # bytes: fp32 weights, two moments, EMAs, target
    share = num_ranks if stage >= 1 else 1
    networks = 1 + facts.has_target + facts.follows_teacher
    weights = networks * low * count / (num_ranks if stage == 3 else 1)
    gradients = low * count / (num_ranks if stage >= 2 else 1)
    states = masters * count / share
    flop = forward_flop(config)
    image_flop = flop * config.method.forward_passes
    images = config.train.total_steps * config.train.global_batch_size
    days = images * image_flop / (num_ranks * tflops * 1e12) / 86400
    return [
        ("parameters", f"{count / 1e6:.1f} M"),
        ("ranks, micro-batch, accumulation", _batch(config, num_ranks)),
        ("weights per rank", f"{weights / GIB:.2f} GiB ({networks} networks, {config.engine.precision})"),
        ("gradients per rank", f"{gradients / GIB:.2f} GiB"),
        (
            "fp32 states per rank",
            f"{states / GIB:.2f} GiB (master, two moments, {copies} EMA{', target' * facts.has_target})",
        ),
        ("forward pass", f"{flop / 1e12:.3g} TFLOP per image"),
        ("training", f"{image_flop / 1e12:.3g} TFLOP per image, {images:,} images"),
        ("checkpoint", f"{masters * count / GIB:.2f} GiB"),
        ("time", f"{days:.3g} days at {tflops:g} TFLOP/s per GPU (an assumption: measure yours)"),
    ]


def _batch(config: Config, num_ranks: int) -> str:
    accumulation = accumulation_steps(config, num_ranks=num_ranks)
    return f"{num_ranks}, {config.train.micro_batch_size}, {accumulation}"
