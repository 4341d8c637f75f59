"""Defines the small network, config and training steps of the engine tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cmscale.config import Config, parse_config
from cmscale.config.schedules import ScheduleValues
from cmscale.distributed.world import World, connect, detect
from cmscale.engine.checkpoint_reader import by_name
from cmscale.engine.engine import Engine, StepResult

TEXT = """
method: {kind: ct, distance: l2}
model: {image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-2}
train: {total_steps: 100, global_batch_size: 8, micro_batch_size: 2}
ema: {rates: [0.9, 0.5]}
"""


def whole(engine: Engine, quantity: str) -> dict[str, torch.Tensor]:
    """A gathered quantity, by parameter name and in the parameters' shapes. Collective."""
    return by_name(engine.shards.full(quantity), engine.shards.parameters)


def small_config(*overrides: str) -> Config:
    return parse_config(TEXT, list(overrides))


class SmallNetwork(nn.Module):
    """A network with the UNet's interface, and parameter sizes that make ZeRO pad its partitions."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.time = nn.Linear(1, 5)
        self.last = nn.Conv2d(5, 3, 3, padding=1)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator).mul_(0.2)

    def forward(
        self, x: torch.Tensor, c_noise: torch.Tensor, *, labels: Any = None, dropout_keys: Any = None
    ) -> torch.Tensor:
        dtype = self.first.weight.dtype
        hidden = self.first(x.to(dtype)) + self.time(c_noise[:, None].to(dtype))[:, :, None, None]
        return self.last(torch.nn.functional.silu(hidden)).float()


def images(step: int) -> torch.Tensor:
    """The global batch of a step, [8, 3, 8, 8]."""
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def values_at(step: int) -> ScheduleValues:
    return ScheduleValues(step=step, learning_rate=1e-2 / (1 + step), num_scales=4, target_ema=0.8)


def joined() -> World:
    world = detect("cpu")
    connect(world)
    return world


def micro_losses(
    engine: Engine,
    step: int,
    world: World,
    *,
    micro: int = 2,
    spoil: Callable[[int], bool] = lambda index: False,
) -> list[Callable[[], torch.Tensor]]:
    """This rank's losses of a step: the student against the target, or without a target against itself."""
    own = images(step).chunk(world.num_ranks)[world.rank].split(micro)

    def loss(index: int) -> torch.Tensor:
        clean = own[index]
        sigma = torch.linspace(0.1, 1.0, len(clean))
        teacher = engine.target or engine.network
        with torch.no_grad():
            goal = teacher(clean, sigma)
        out = engine.network(clean + 0.3, sigma)
        found = ((out - goal - clean) ** 2).mean()
        return found * float("nan") if spoil(index) else found

    return [lambda index=index: loss(index) for index in range(len(own))]


def train(engine: Engine, world: World, steps: range) -> list[StepResult]:
    results = []
    for step in steps:
        values = values_at(step)
        result = engine.step(micro_losses(engine, step, world), values.learning_rate)
        if result.applied:
            engine.shards.update(values)
        results.append(result)
    return results
