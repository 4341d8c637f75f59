"""Rank function that trains the engine beside the plain loop of `ops/bench`."""

import json
import sys
from pathlib import Path

import torch
from small import joined

from cmscale.config import parse_config

sys.path.insert(0, str(Path(__file__).parents[2] / "ops" / "bench"))

import train_step
from plain_loop import PlainLoop


def compared() -> None:
    """Seven steps of both in several stages, after which every quantity of the engine is the loop's bit for bit."""
    world = joined()
    found = {}
    for stage, precision, micro in ((0, "fp32", 2), (2, "fp32", 2), (2, "bf16", 4)):
        keys = [f"engine.zero_stage={stage}", f"engine.precision={precision}", f"train.micro_batch_size={micro}"]
        config = parse_config(train_step.SMALL, [*train_step.TINY, "train.global_batch_size=4", *keys])
        step = train_step.make_step(config, world)
        loop = PlainLoop(step.parts, step.batch)
        shards = step.parts.engine.shards
        start = shards.local("master").clone()
        for _ in range(7):  # RAdam divides by the second moment from its sixth step on
            step()
            loop()
        assert not torch.equal(shards.local("master"), start)
        equal = {name: torch.equal(shards.local(name), flat) for name, flat in loop.flats().items()}
        found[f"{stage} {precision}"] = equal
        step.parts.engine.close()
    print(json.dumps(found))
