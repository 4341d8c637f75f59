"""Replaces the engine in tests of checkpoints: shards over plain tensors, without DeepSpeed."""

import torch

from cmscale.config import Config, parse_config
from cmscale.config.averages import power_exponent, power_name
from cmscale.distributed.world import World
from cmscale.engine import flat_space
from cmscale.engine.shards import FlatShards, Read
from cmscale.runs.manifests import MOMENTS, CheckpointManifest, Parameter
from cmscale.runs.partition import Partition, partition_of

SHAPES = {"a.weight": (3, 5), "a.bias": (3,), "b.weight": (2, 2, 2), "b.bias": ()}

TEXT = """
method: {kind: ct, distance: l2}
model: {image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-2}
train: {total_steps: 100, global_batch_size: 8, micro_batch_size: 2}
ema: {rates: [0.9, 0.5]}
checkpoint: {every_steps: 10}
"""


def flat_config(*overrides: str) -> Config:
    return parse_config(TEXT, list(overrides))


def parameters_of(shapes: dict[str, tuple[int, ...]]) -> tuple[Parameter, ...]:
    module = torch.nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.zeros(shape)))
    return flat_space.number_parameters(module)


class StandIn:
    """The state of one rank; each quantity has different values, drawn from `seed`."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        *,
        zero_stage: int = 2,
        seed: int = 0,
        has_target: bool = True,
        lengths: tuple[float, ...] = (),
    ) -> None:
        self.parameters = parameters_of(SHAPES)
        total = flat_space.count_elements(self.parameters)
        part = flat_space.flat_part_size(total, num_ranks=num_ranks, alignment=2)
        partition = Partition(self.parameters, num_ranks, zero_stage, part)
        powers = {power_name(length): power_exponent(length) for length in lengths}
        names = ("master", "exp_avg", "exp_avg_sq", "target", "ema_0.9", "ema_0.5", *powers)
        self.whole = {
            name: torch.randn(total, generator=torch.Generator().manual_seed(seed + index))
            for index, name in enumerate(names)
        }
        pieces = [
            flat_space.Piece(
                s.start,
                {name: self.whole[name][s.start : s.start + s.length].clone() for name in ("master", *MOMENTS)},
            )
            for s in partition[rank]
        ]
        self.published = torch.zeros(0)
        self.shards = FlatShards(
            self.parameters,
            pieces,
            partition=partition,
            rank=rank,
            ema_rates={"ema_0.9": 0.9, "ema_0.5": 0.5},
            power_exponents=powers,
            has_target=has_target,
            publish_target=self._publish if has_target else None,
        )
        self._scalars = {"optimizer_step": float(seed)}
        self.restore(lambda quantity, start, length: self.whole[quantity][start : start + length], self._scalars)

    def _publish(self, local: torch.Tensor) -> None:
        self.published = local.clone()

    def scalars(self) -> dict[str, float]:
        return self._scalars

    def restore(self, read: Read, scalars: dict[str, float]) -> None:
        self._scalars = dict(scalars)
        self.shards.restore(read)


def as_version(version: int, manifest: CheckpointManifest) -> CheckpointManifest:
    """A manifest as versions 1 and 2 have it, with every segment."""
    parts = zip(manifest.parts, partition_of(manifest), strict=True)
    listed = tuple(part.model_copy(update={"segments": segments}) for part, segments in parts)
    return manifest.model_copy(update={"version": version, "part_size": None, "parts": listed})


def ranks_of(num_ranks: int) -> list[World]:
    return [
        World(rank=rank, num_ranks=num_ranks, rank_of_node=rank, ranks_per_node=num_ranks) for rank in range(num_ranks)
    ]
