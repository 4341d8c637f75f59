"""Rank functions of the engine tests of sCM and progressive distillation; they print JSON."""

import json

import torch
from small import images, joined, whole

from cmscale.config import parse_config, schedules
from cmscale.rng import SampleRandomness
from cmscale.training.assemble import assemble

TEXT = """
method: METHOD
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_resolutions: [4],
        head_channels: 32, dropout: 0.1}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-2}
train: {total_steps: 6, global_batch_size: 8, micro_batch_size: 4}
ema: {rates: [0.9]}
"""


def losses(method: str) -> None:
    """Losses and gradient norms of four steps per ZeRO stage, and the change of the weighting."""
    world = joined()
    found = {}
    for stage in range(4 if "kind: pd" in method else 3):  # sCM can't use stage 3
        config = parse_config(TEXT.replace("METHOD", method), [f"engine.zero_stage={stage}"])
        parts = assemble(config, world, fresh=True)
        before = whole(parts.engine, "master")
        results = []
        ends = []
        for step in range(4):
            values = schedules.at(config, step)
            own = images(step).clamp(-1, 1).chunk(world.num_ranks)[world.rank]
            positions = range(8 * step + world.rank * len(own), 8 * step + (world.rank + 1) * len(own))
            numbers = SampleRandomness(0, tuple(positions), world.device).split(4)
            micro = [
                lambda clean=clean, drawn=drawn: parts.loss(parts.networks, clean, values, drawn).mean()  # noqa: B023
                for clean, drawn in zip(own.split(4), numbers, strict=True)
            ]
            result = parts.engine.step(micro, values.learning_rate)
            assert result.applied
            parts.engine.shards.update(values)
            ends.append(values.ends_stage)
            if ends[-1]:
                parts.engine.start_over()
                shards = parts.engine.shards
                assert parts.engine.scalars()["optimizer_step"] == 0
                assert torch.equal(shards.full("ema_0.9"), shards.full("master"))
                assert not any(shards.full(name).any() for name in ("exp_avg", "exp_avg_sq"))
            results.append([result.loss, result.grad_norm])
        assert ends == ([False, True, False, True] if config.method.kind == "pd" else [False] * 4)
        after = whole(parts.engine, "master")
        moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
        found[str(stage)] = results
        watched = [name for name in moved if name.startswith("weighting.") or name == "out.2.weight"]
        assert len(watched) == (1 if config.method.kind == "pd" else 3)
        assert all(moved[name] > 0 for name in watched), moved
        parts.engine.close()
    print(json.dumps(found))
