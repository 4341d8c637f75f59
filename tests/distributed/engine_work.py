"""Rank functions of the engine tests; each runs on every rank and prints JSON."""

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SmallNetwork, images, joined, micro_losses, small_config, train, values_at, whole
from torch import nn
from torch.overrides import TorchFunctionMode

from cmscale.config import Config
from cmscale.distributed.collectives import barrier
from cmscale.distributed.world import World
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import read_weights
from cmscale.engine.engine import Engine, NonFiniteLoss
from cmscale.engine.fence import claim_generation
from cmscale.engine.resume import newest, restore
from cmscale.model.compiled import compile_blocks
from cmscale.model.unet import build_unet
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState


def engine_at(world: World, stage: int, *overrides: str, has_target: bool = True) -> Engine:
    config = small_config(f"engine.zero_stage={stage}", *overrides)
    return Engine(config, world, SmallNetwork, has_target=has_target)


def digest(engine: Engine) -> dict[str, str]:
    """A hash of each quantity's gathered flat space. Collective."""
    flats = {name: engine.shards.full(name) for name in engine.shards.quantities}
    return {name: hashlib.sha256(flat.numpy().tobytes()).hexdigest() for name, flat in flats.items()}


def losses(precision: str, *overrides: str) -> None:
    """Losses and gradient norms of four steps per ZeRO stage, with and without a target network."""
    if precision == "fp16":
        allow_fp16()
    world = joined()
    found = {}
    for stage in range(4):
        for has_target in (True, False):
            engine = engine_at(world, stage, f"engine.precision={precision}", *overrides, has_target=has_target)
            results = train(engine, world, range(4))
            assert all(result.applied for result in results)
            assert engine.scalars()["optimizer_step"] == 4
            found[f"{stage} {has_target}"] = [[result.loss, result.grad_norm] for result in results]
            engine.close()
    print(json.dumps(found))


def bad_steps() -> None:
    """A NaN loss on one rank's first micro-batch, then a NaN gradient: neither changes the state."""
    world = joined()
    for stage, precision in (
        (0, "fp32"),
        (1, "fp32"),
        (2, "fp32"),
        (3, "fp32"),
        (0, "bf16"),
        (1, "bf16"),
        (2, "bf16"),
    ):
        golden, engine = (engine_at(world, stage, f"engine.precision={precision}") for _ in range(2))
        train(golden, world, range(3))
        train(engine, world, range(2))
        before = digest(engine)
        on_last_rank = world.rank == world.num_ranks - 1
        with pytest.raises(NonFiniteLoss) as raised:
            engine.step(micro_losses(engine, 7, world, spoil=lambda i: i == 0 and on_last_rank), 1e-2)  # noqa: B023
        assert raised.value.ranks == [world.num_ranks - 1]
        assert digest(engine) == before

        def nan_gradient() -> torch.Tensor:
            out = engine.network(torch.ones(2, 3, 8, 8), torch.ones(2))  # noqa: B023
            return (out * 0.0).sum().abs().sqrt()  # 0, with a gradient of 0 / 0

        result = engine.step([nan_gradient] * engine_micro_steps(world), 1e-2)
        assert (result.applied, result.loss, result.grad_norm) == (False, 0.0, math.inf)
        assert digest(engine) == before
        train(engine, world, range(2, 3))
        assert digest(engine) == digest(golden)
        engine.close()
        golden.close()
    print(json.dumps("ok"))


class Waits(TorchFunctionMode):
    """Counts the calls by which the host reads a value, for which it would wait on a GPU."""

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__bool__", "__int__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.READS
        return func(*args, **(kwargs or {}))


def waits() -> None:
    """How often the host reads a value in a step, per stage: until the last backward pass begins, and after it."""
    world = joined()
    found = {}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (2, "fp32")):
        engine = engine_at(world, stage, f"engine.precision={precision}")
        train(engine, world, range(1))
        losses, before = micro_losses(engine, 1, world), []

        def last(compute: Any = losses[-1], before: list[int] = before) -> torch.Tensor:
            loss = compute()
            loss.register_hook(lambda gradient: before.append(counted.count))
            return loss

        with Waits() as counted:
            assert engine.step([*losses[:-1], last], 1e-2).applied
        found[f"{stage} {precision}"] = [before[0], counted.count - before[0]]
        engine.close()
    print(json.dumps(found))


class Line(nn.Module):
    """weight times x, summed: every element's gradient is x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x.to(self.weight.dtype)).sum().float()


def mean_gradients(precision: str, stage: int, gradients: list[list[float]]) -> None:
    """Makes one step of a network in which micro-batch j of rank i has the gradient gradients[i][j]; prints the mean.

    The mean is read from Adam's first moment after the first step, which is (1 - beta1) times the gradient.
    """
    world = joined()
    own = gradients[world.rank]
    overrides = f"engine.zero_stage={stage}", f"engine.precision={precision}", "optimizer.kind=adam"
    batch = f"train.global_batch_size={world.num_ranks * len(own)}", "train.micro_batch_size=1"
    config = small_config(*overrides, *batch)
    engine = Engine(config, world, Line)
    result = engine.step([lambda x=x: engine.network(torch.tensor(x)) for x in own], 1e-2)
    assert result.applied
    moments = engine.shards.full("exp_avg") / (1 - config.optimizer.betas[0])
    assert bool((moments == moments[0]).all())
    norm = result.grad_norm / math.sqrt(moments.numel())
    engine.close()
    print(json.dumps([float(moments[0]), norm]))


def unet_losses() -> None:
    """Two steps of the UNet per ZeRO stage, with target, teacher and dropout, with and without recomputation."""
    world = joined()
    found = {}
    for stage in range(4):
        for recomputes in ("false", "true"):
            config = small_config(
                f"engine.zero_stage={stage}",
                f"model.activation_checkpointing={recomputes}",
                "model.channel_multipliers=[1,2]",
                "model.attention_resolutions=[4]",
                "model.dropout=0.1",
                "train.micro_batch_size=4",
            )
            engine = Engine(config, world, lambda: build_unet(config.model), has_target=True)  # noqa: B023
            weights = build_unet(config.model, seed=5).state_dict()
            teacher = engine.add_frozen("teacher", weights, lambda: build_unet(config.model))  # noqa: B023
            results = []
            for step in range(2):
                own = images(step).chunk(world.num_ranks)[world.rank].split(4)

                def loss(clean: torch.Tensor) -> torch.Tensor:
                    sigma, keys = torch.full((4,), 0.5), tuple(int(1e6 * float(image.abs().sum())) for image in clean)
                    assert engine.target is not None  # noqa: B023
                    goal = engine.target(clean, sigma, dropout_keys=keys) + teacher(clean, sigma)  # noqa: B023
                    out = engine.network(clean + 0.1, sigma, dropout_keys=keys)  # noqa: B023
                    return ((out - goal - clean) ** 2).mean()

                result = engine.step([partial(loss, clean) for clean in own], 1e-3)
                engine.shards.update(values_at(step))
                results.append([result.loss, result.grad_norm])
            found[f"{stage} {recomputes}"] = results
            engine.close()
    print(json.dumps(found))


def compiled_losses() -> None:
    """Three steps of the UNet with compiled blocks and without, per ZeRO stage, and one that goes on with the other."""
    world = joined()

    def builder(config: Config) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            network = build_unet(config.model)
            if config.model.compile == "blocks":
                compile_blocks(network, backend="aot_eager")
            return network

        return build

    def steps(engine: Engine, numbers: range) -> list[list[float]]:
        found = []
        for number in numbers:
            result = engine.step([partial(compiled_loss, engine, clean) for clean in own_images(number, world)], 1e-3)
            engine.shards.update(values_at(number))
            found.append([result.loss, result.grad_norm])
        return found

    found, again = {}, {}
    graphs = torch._dynamo.utils.counters["stats"]
    for stage, recomputes in ((0, "false"), (1, "false"), (2, "true"), (3, "true")):
        keys = [f"engine.zero_stage={stage}", f"model.activation_checkpointing={recomputes}", "model.dropout=0.1"]
        plain, compiled = small_config(*keys), small_config(*keys, "model.compile=blocks")
        engines = [Engine(config, world, builder(config), has_target=True) for config in (plain, compiled)]
        found[f"{stage} {recomputes}"] = steps(engines[0], range(3))
        found[f"{stage} {recomputes} compiled"] = steps(engines[1], range(1))
        compiled_once = graphs["unique_graphs"]
        found[f"{stage} {recomputes} compiled"] += steps(engines[1], range(1, 3))
        again[stage] = graphs["unique_graphs"] - compiled_once
        flats = {name: engines[1].shards.full(name) for name in engines[1].shards.quantities}
        scalars = engines[1].scalars()
        engines[0].restore(lambda name, start, length: flats[name][start : start + length], scalars)  # noqa: B023
        found[f"{stage} {recomputes}, gone on"] = steps(engines[0], range(3, 4))
        found[f"{stage} {recomputes} compiled, gone on"] = steps(engines[1], range(3, 4))
        with engines[1].showing("ema_0.9") as network, torch.no_grad():
            network(torch.zeros(5, 3, 8, 8), torch.ones(5))  # a batch size that nothing is compiled for
        for engine in engines:
            engine.close()
    breaks = len(torch._dynamo.utils.counters["graph_break"])
    print(json.dumps({"losses": found, "breaks": breaks, "compiled": graphs["unique_graphs"], "again": again}))


def own_images(step: int, world: World) -> tuple[torch.Tensor, ...]:
    return images(step).chunk(world.num_ranks)[world.rank].split(2)


def compiled_loss(engine: Engine, clean: torch.Tensor) -> torch.Tensor:
    """Student against target, with dropout."""
    sigma, keys = torch.full((2,), 0.5), tuple(int(1e6 * float(image.abs().sum())) for image in clean)
    assert engine.target is not None
    goal = engine.target(clean, sigma, dropout_keys=keys)
    return ((engine.network(clean + 0.1, sigma, dropout_keys=keys) - goal - clean) ** 2).mean()


def float32_values() -> None:
    """After bf16 steps, in every stage: float32 layers of student, target and teacher have the fp32 values."""
    world = joined()
    for stage in range(4):
        config = small_config(f"engine.zero_stage={stage}", "engine.precision=bf16", "model.channel_multipliers=[1,2]")
        engine = Engine(config, world, lambda: build_unet(config.model), has_target=True)  # noqa: B023
        weights = build_unet(config.model, seed=5).state_dict()
        teacher = engine.add_frozen("teacher", weights, lambda: build_unet(config.model))  # noqa: B023
        assert_float32_values(teacher.module, weights)
        for step in range(2):
            results = train(engine, world, range(step, step + 1))
            assert results[0].applied
            assert_float32_values(engine.network.module, whole(engine, "master"))
            assert_float32_values(engine.target.module, whole(engine, "target"))
        averages = whole(engine, "ema_0.9")
        with engine.showing("ema_0.9") as network:
            assert_float32_values(network.module, averages)
        assert_float32_values(engine.network.module, whole(engine, "master"))
        engine.close()
    print(json.dumps("ok"))


def assert_float32_values(network: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """The layers hold the fp32 values bit for bit, and some of these are no bf16 numbers."""
    names = network.float32_parameters
    assert {"time_embed.0.weight", "out.2.bias", "middle_block.0.emb_layers.1.weight"} < set(names)
    rounded = 0
    for name in names:
        path, _, leaf = name.rpartition(".")
        assert torch.equal(network.get_submodule(path)._values[leaf], expected[name]), name
        rounded += int((expected[name] != expected[name].bfloat16().float()).sum())
    assert rounded > 1000


def engine_micro_steps(world: World) -> int:
    return 4 // world.num_ranks


def allow_fp16() -> None:
    """Allows fp16 on the CPU, where it works but is slow."""
    from deepspeed.accelerator import get_accelerator

    from cmscale.engine import settings

    settings.check_precision = lambda config, device: None
    accelerator = get_accelerator()
    assert accelerator is not None
    accelerator.is_fp16_supported = lambda: True


def overflow() -> None:
    """fp16 with a far too large loss scale: steps are skipped, the scale falls, the weights stay."""
    allow_fp16()
    world = joined()
    found = {}
    for stage in range(4):
        engine = engine_at(world, stage, "engine.precision=fp16", "engine.initial_loss_scale_power=24")
        before = digest(engine)
        results = []
        for step in range(12):
            result = engine.step(micro_losses(engine, step, world), values_at(step).learning_rate)
            if not any(earlier.applied for earlier in results) and not result.applied:
                assert digest(engine) == before
            results.append(result)
        found[stage] = [[result.applied, result.loss_scale] for result in results]
        assert engine.scalars()["optimizer_step"] == sum(result.applied for result in results)
        engine.close()
    print(json.dumps(found))


def save_in_every_stage(folder: str) -> None:
    """Trains five steps per ZeRO stage and saves after three; a restored engine must end bit for bit equal."""
    world = joined()
    found = {}
    for stage, precision in (*((stage, "fp32") for stage in range(4)), (0, "bf16"), (2, "bf16"), (3, "bf16")):
        run = RunDir(Path(folder) / f"stage{stage}-{precision}")
        overrides = (f"engine.zero_stage={stage}", f"engine.precision={precision}")
        config = small_config(*overrides)
        engine = engine_at(world, *overrides_of(stage, precision))
        train(engine, world, range(3))
        checkpoints = Checkpoints(run, config, world, generation=claim_generation(run), data_fingerprint="data")
        checkpoints.save(TrainState(step=3, cursor=24), engine)
        saved = digest(engine)
        losses_after = [result.loss for result in train(engine, world, range(3, 5))]
        assert checkpoints.close()
        golden = digest(engine)
        engine.close()

        again = engine_at(world, *overrides_of(stage, precision))
        state = resume(run, again, world, *overrides)
        assert state == TrainState(step=3, cursor=24)
        assert digest(again) == saved
        assert [result.loss for result in train(again, world, range(3, 5))] == losses_after
        assert digest(again) == golden
        again.close()
        found[run.name] = saved
    print(json.dumps(found))


def overrides_of(stage: int, precision: str) -> tuple[int, str]:
    return stage, f"engine.precision={precision}"


def resume(run: RunDir, engine: Engine, world: World, *overrides: str) -> TrainState:
    found = newest(run, small_config(*overrides), world, data_fingerprint="data")
    assert found is not None
    return restore(found, engine)


def restore_elsewhere(folder: str) -> None:
    """Loads the checkpoint of every ZeRO stage into the next stage: after gathering, bit for bit equal."""
    world = joined()
    found = {}
    for path in sorted(Path(folder).iterdir()):
        stage, precision = int(path.name[5]), path.name[7:]
        other = (stage + 1) % 4
        engine = engine_at(world, *overrides_of(other, precision))
        resume(RunDir(path), engine, world, f"engine.zero_stage={other}", f"engine.precision={precision}")
        found[path.name] = digest(engine)
        for quantity in engine.shards.quantities:
            read = read_weights(path / "checkpoints" / "step-000000003", quantity)
            restored = whole(engine, quantity)
            assert all(torch.equal(restored[name], value) for name, value in read.items())
        shown(engine)
        found[f"{path.name} loss"] = [result.loss for result in train(engine, world, range(3, 5))]
        engine.close()
        barrier()
    print(json.dumps(found))


def shown(engine: Engine) -> None:
    """Sampling with an EMA uses its weights, and does not change the network."""
    clean, sigma = torch.ones(2, 3, 8, 8), torch.ones(2)
    with torch.no_grad():
        before = engine.network(clean, sigma)
        reference = SmallNetwork()
        dtype = torch.bfloat16 if engine.dtype == torch.bfloat16 else torch.float32
        reference.load_state_dict(whole(engine, "ema_0.5"))
        expected = reference.to(dtype)(clean, sigma)
        with engine.showing("ema_0.5") as network:
            assert torch.equal(network(clean, sigma), expected)
        reference.load_state_dict(whole(engine, "target"))
        assert engine.target is not None
        assert torch.equal(engine.target(clean, sigma), reference.to(dtype)(clean, sigma))
        assert torch.equal(engine.network(clean, sigma), before)
