"""Measures a training step: as a whole, its parts, and bare convolutions of the network's own shapes in the same run.

    python ops/bench/train_step.py [CONFIG [key=value ...]] [--rounds 5] [--device auto|cpu|cuda] [--threads 1]
                                   [--original DIR] [--profile FILE] [--json FILE] [--against FILE]

Without a config it measures CT on a small network of 64 px. The step is that of `cmscale.training` on one rank: engine,
loss, averages, random numbers; images come from memory. Its rate is the FLOP of the whole loss per second of the whole
step. The framework's own overhead is the step of a tiny network less a plain PyTorch loop of the same, in each round.
`--original` measures the step of the released code in the same rounds, from a checkout of it. On a CPU, seconds are CPU
seconds of this process. LPIPS takes random weights.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import bare
import harness
import torch
from harness import Row
from plain_loop import PlainLoop

from cmscale.commands.use import USED
from cmscale.config import Config, parse_config, read_config, schedules
from cmscale.consistency.distance import lpips_network
from cmscale.data import Batch
from cmscale.distributed import world as worlds
from cmscale.distributed.world import World
from cmscale.engine.settings import COMPUTE_DTYPES
from cmscale.model.unet import build_unet
from cmscale.rng import sample_randomness
from cmscale.training.assemble import Parts, assemble
from cmscale.training.estimate import counts

SMALL = """
method: {kind: ct, distance: l2}
model: {image_size: 64, channels: 64, channel_multipliers: [1, 2, 3], num_res_blocks: 2, attention_resolutions: [16],
        head_channels: 64}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-5}
train: {total_steps: 1000, global_batch_size: 8, micro_batch_size: 8}
ema: {rates: [0.9999, 0.99994, 0.999943]}
engine: {zero_stage: 0}
"""
TINY = ["model.image_size=8", "model.channels=32", "model.channel_multipliers=[1]", "model.attention_resolutions=[]"]
TINY += ["model.head_channels=32", "model.num_res_blocks=1"]
TINY_STEPS = 10  # of a tiny network that are measured together
WANTED = {"cpu": {"fp32": 0.88, "bf16": 0.75}, "cuda": {}}


@dataclass
class Step:
    """A training step of one rank, ready to be made again and again."""

    config: Config
    parts: Parts
    batch: Batch

    def __call__(self) -> None:
        values = schedules.at(self.config, self.config.train.total_steps - 1)
        result = self.parts.step(self.batch, values)
        if result.applied:
            self.parts.engine.shards.update(values)


def images_of(config: Config) -> torch.Tensor:
    """A global batch of random images, uint8 as a data set has them."""
    side, source = config.model.image_size, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (config.train.global_batch_size, 3, side, side), generator=source, dtype=torch.uint8)


def random_vgg(config: Config, folder: Path) -> Config:
    """The config with random weights for LPIPS, if its distance is LPIPS."""
    settings = config.method.distance_settings
    if settings is None or settings.name != "lpips":
        return config
    from safetensors.torch import save_file

    network = lpips_network(settings, config.model.image_size)
    state = {}
    for number in range(len(network.convolutions)):
        for part in ("weight", "bias"):
            state[f"features.{number}.{part}"] = network.get_parameter(f"convolutions.{number}.{part}").detach().clone()
    save_file(state, folder / "vgg.safetensors")
    given = {"lpips_weights": str(folder / "vgg.safetensors")}
    return config.model_copy(update={"method": config.method.model_copy(update=given)})


def make_step(config: Config, world: World) -> Step:
    """The step of a config on random images, on this rank."""
    parts = assemble(config, world, fresh=True)
    images = images_of(config)[: config.train.global_batch_size // world.num_ranks]
    count = len(images)
    flips = torch.zeros(count, dtype=torch.bool)
    batch = Batch(images, tuple(range(count)), tuple(map(str, range(count))), flips)
    return Step(config, parts, batch)


def pieces(step: Step, device: torch.device, clock: Callable[[], float]) -> dict[str, harness.Action]:
    """What a step consists of, each alone: seconds for a whole global batch."""
    config, engine = step.config, step.parts.engine
    values = schedules.at(config, config.train.total_steps - 1)
    size, side = config.train.micro_batch_size, config.model.image_size
    micro = config.train.global_batch_size // size
    network = build_unet(config.model).to(device=device, dtype=COMPUTE_DTYPES[config.engine.precision])
    noisy, times = torch.randn(size, 3, side, side, device=device), torch.zeros(size, device=device)

    def draw() -> None:
        for number in range(micro):
            positions = range(number * size, (number + 1) * size)
            random = sample_randomness(config.train.random_numbers, seed=0, positions=positions, device=device)
            random.noise((3, side, side))
            random.uniform()

    def forward() -> None:
        with torch.no_grad():
            for _ in range(micro):
                network(noisy, times)

    def both() -> None:
        for _ in range(micro):
            network(noisy, times).mean().backward()

    actions = {
        "random numbers": draw,
        "network, forward": forward,
        "network, forward and backward": both,
        "averages and target": lambda: engine.shards.update(values),
    }
    return {name: harness.seconds(action, clock) for name, action in actions.items()}


def tiny_steps(step: Step, clock: Callable[[], float]) -> dict[str, harness.Action]:
    """Seconds of a step of a tiny network, by the framework and as a plain loop."""
    plain = PlainLoop(step.parts, step.batch)

    def repeated(action: Callable[[], object]) -> harness.Action:
        measured = harness.seconds(lambda: [action() for _ in range(TINY_STEPS)], clock)
        return lambda: measured() / TINY_STEPS

    return {"step of a tiny network": repeated(step), "plain loop of a tiny network": repeated(plain)}


@contextlib.contextmanager
def alone(device: str, threads: int) -> Iterator[World]:
    """One rank with its process group."""
    world = worlds.detect(device)
    with harness.threads(threads), tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TMPDIR": folder}
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield world
        finally:
            dist.destroy_process_group()


def profile(step: Step, device: torch.device, path: Path) -> None:
    """Writes a trace of one step, and prints its dearest operators."""
    from cmscale.training.profiling import recording, table

    with recording(device) as recorded:
        step()
    recorded.export_chrome_trace(str(path))
    print(table(recorded))


def main() -> int:
    parser = harness.parser(__doc__)
    harness.add_config(parser, default="a small network")
    parser.add("--threads", use=USED, type=int, default=1, help="threads on a CPU (default: 1)")
    parser.add("--original", use=USED, type=Path, metavar="DIR", help="a checkout of the released code")
    parser.add("--profile", use=USED, type=Path, metavar="FILE", help="also write a trace of one step")
    given = harness.parse(parser)
    with alone(given.device, given.threads) as world, tempfile.TemporaryDirectory() as folder:
        overrides = given.overrides
        config = parse_config(SMALL, overrides) if given.config is None else read_config(given.config, overrides)
        config = random_vgg(config, Path(folder))
        return measure(given, config, world)


def measure(given: Any, config: Config, world: World) -> int:
    device, clock = world.device, harness.clock_of(world.device)
    images = config.train.global_batch_size
    step, smallest = make_step(config, world), make_step(tiny(config), world)
    operations, bare_flop = bare.recorded(config)
    flop = counts.image_flop(config)
    dtype = COMPUTE_DTYPES[config.engine.precision]
    actions: dict[str, harness.Action] = {"step": harness.seconds(step, clock)}
    actions["bare convolutions"] = lambda: bare.run(operations, device, clock)
    actions["dense product"] = lambda: bare.dense_product(device, dtype, seconds=clock)
    actions |= pieces(step, device, clock)
    actions |= tiny_steps(smallest, clock)
    if given.original is not None:
        from original import OriginalStep

        theirs = OriginalStep(given.original, config, device)
        parts = (images_of(config).float() / 127.5 - 1).to(device).split(config.train.micro_batch_size)
        scales = schedules.at(config, config.train.total_steps - 1).num_scales
        assert scales is not None
        actions["step of the original"] = harness.seconds(lambda: theirs(list(parts), num_scales=scales), clock)
    load = os.getloadavg()[0]
    found = harness.interleaved(actions, rounds=given.rounds, warm_up=2)
    if given.profile is not None:
        profile(step, device, given.profile)
    rows = rows_of(found, flop=flop * images, bare_flop=bare_flop, images=images, config=config, device=device)
    facts = {
        "parameters_m": round(counts.num_parameters(config) / 1e6, 1),
        "precision": config.engine.precision,
        "zero_stage": config.engine.zero_stage,
        "gflop_per_image": round(flop / 1e9, 2),
        "images": images,
        "micro_batch": config.train.micro_batch_size,
        "checkpointing": config.model.activation_checkpointing,
        "attention": config.model.attention,
    }
    return harness.report(given, rows, facts=facts, load=load)


def rows_of(
    found: dict[str, list[float]], *, flop: float, bare_flop: float, images: int, config: Config, device: torch.device
) -> list[Row]:
    """The table: rates of the step and its limits, then seconds."""
    clock = "cpu" if device.type == "cpu" else "wall"
    bare_rates = [bare_flop / value / 1e9 for value in found["bare convolutions"]]
    rates = [flop / value / 1e9 for value in found["step"]]
    micro = images // config.train.micro_batch_size
    wanted = WANTED[device.type].get(config.engine.precision)
    of_dense = 0.45 if device.type == "cuda" and config.engine.precision != "fp32" else None
    rows = [
        Row("step", "GFLOP/s", rates, baseline="bare convolutions", wanted=wanted, clock=clock),
        Row("step, of the dense product", "GFLOP/s", rates, baseline="dense product", wanted=of_dense, clock=clock),
        Row("bare convolutions", "GFLOP/s", bare_rates, clock=clock),
        Row("dense product", "GFLOP/s", [value / 1e9 for value in found["dense product"]], clock=clock),
        Row("step, images", "images/s", [images / value for value in found["step"]], clock=clock),
    ]
    if "step of the original" in found:
        theirs = [images / value for value in found["step of the original"]]
        wanted = 2.0 if device.type == "cuda" else 1.0
        ours = [images / value for value in found["step"]]
        rows.append(Row("step, of the original's", "images/s", ours, "original, images", wanted, clock))
        rows.append(Row("original, images", "images/s", theirs, clock=clock))
    rows.append(Row("step, seconds", "s", found["step"], clock=clock))
    rows.append(Row("bare convolutions, seconds", "s", [micro * v for v in found["bare convolutions"]], clock=clock))
    for name in ("random numbers", "network, forward", "network, forward and backward", "averages and target"):
        rows.append(Row(name, "s", found[name], clock=clock))
    tiny_step, plain = found["step of a tiny network"], found["plain loop of a tiny network"]
    rows.append(Row("step of a tiny network", "s", tiny_step, clock=clock))
    rows.append(Row("plain loop of a tiny network", "s", plain, clock=clock))
    overhead = [whole - bare for whole, bare in zip(tiny_step, plain, strict=True)]
    rows.append(Row("overhead of a step", "s", overhead, wanted=0.005, clock=clock))
    return rows


def tiny(config: Config, *, ranks: int = 1) -> Config:
    """A network so small that the framework's own overhead shows."""
    engine = config.engine
    keys = [f"engine.precision={engine.precision}", f"engine.zero_stage={engine.zero_stage}"]
    keys += [f"engine.parameters={engine.parameters}", f"train.global_batch_size={8 * ranks}"]
    return parse_config(SMALL, [*TINY, *keys])


if __name__ == "__main__":
    sys.exit(harness.run(main))
