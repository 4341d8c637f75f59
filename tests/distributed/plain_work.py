"""Rank functions that train the engine beside what must compute the same: a plain loop, parameters as one tensor."""

import json
import sys
from pathlib import Path

import pytest
import torch
from engine_work import digest
from small import joined, micro_losses, small_config, train

from cmscale.config import parse_config
from cmscale.engine.engine import Engine, NonFiniteLoss
from cmscale.model.unet import build_unet

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
    # Where nothing is compiled, no rank imports the compiler: that takes seconds of each start.
    assert "torch._inductor.compile_fx" not in sys.modules
    print(json.dumps(found))


def one_tensor() -> None:
    """The UNet with its parameters separate and joined: the same bits while training, sampling, restored, after NaN."""
    world = joined()
    for stage, precision, recomputes in ((0, "fp32", "false"), (2, "bf16", "true")):
        keys = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
        keys += [f"model.activation_checkpointing={recomputes}"]
        engines = []
        for parameters in ("separate", "joined"):
            config = small_config(*keys, f"engine.parameters={parameters}")
            engines.append(Engine(config, world, lambda: build_unet(config.model), has_target=True))  # noqa: B023
        separate, one = engines
        start = digest(separate)
        first, second = (train(engine, world, range(2)) for engine in engines)
        assert [result.loss for result in first] == [result.loss for result in second]
        assert digest(one) == digest(separate) != start
        shown = []
        for engine in engines:
            with engine.showing("ema_0.9") as network:
                shown.append(network(torch.ones(1, 3, 8, 8), torch.ones(1)))
        assert torch.equal(*shown)
        with pytest.raises(NonFiniteLoss):
            one.step(micro_losses(one, 2, world, spoil=lambda index: index == 0), 1e-2)
        flats = {name: separate.shards.full(name) for name in separate.shards.quantities}
        train(one, world, range(2, 3))  # away from the other
        one.restore(lambda name, start, length: flats[name][start : start + length], separate.scalars())  # noqa: B023
        for engine in engines:
            train(engine, world, range(3, 4))
        assert digest(one) == digest(separate)
        assert len(list(one.network.module.parameters())) == 1
        for engine in engines:
            engine.close()
    print(json.dumps("ok"))
