"""Measures sampling in one and two steps: with the conversion to pixels and the writing of files, and the bare network.

    python ops/bench/sampling.py [CONFIG [key=value ...]] [--samples 16] [--batch-size 8] [--rounds 5]
                                 [--device auto|cpu|cuda] [--threads 1] [--json FILE] [--against FILE]

Samples are drawn as `cmscale sample` draws them, from random weights, which cost as much as trained ones. The baseline
is the network alone on the same batches, evaluated as often. On a CPU, seconds are CPU seconds of this process.
"""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import harness
import numpy as np
import torch
from harness import Row
from train_step import SMALL

from cmscale.commands.use import USED
from cmscale.config import parse_config, read_config
from cmscale.consistency.sampler import sample
from cmscale.distributed.world import choose_device
from cmscale.engine.settings import COMPUTE_DTYPES
from cmscale.errors import UserError
from cmscale.generation.sample_set import as_array, write_grid
from cmscale.generation.set_files import write_npz
from cmscale.io.place import Place
from cmscale.model.precondition import denoiser_for
from cmscale.model.unet import build_unet

STEPS = (1, 2)


def main() -> int:
    parser = harness.parser(__doc__)
    harness.add_config(parser, default="a small network")
    parser.add("--samples", use=USED, type=int, default=16, help="samples per round (default: 16)")
    parser.add("--batch-size", use=USED, type=int, default=8)
    parser.add("--threads", use=USED, type=int, default=1, help="threads on a CPU (default: 1)")
    given = harness.parse(parser)
    if given.samples % given.batch_size or given.samples < 1:
        raise UserError(f"--samples {given.samples}: must be a multiple of --batch-size {given.batch_size}")
    device, overrides = choose_device(given.device), given.overrides
    config = parse_config(SMALL, overrides) if given.config is None else read_config(given.config, overrides)
    network = build_unet(config.model).to(device=device, dtype=COMPUTE_DTYPES[config.engine.precision]).eval()
    denoise, side = denoiser_for(config.method, network), config.model.image_size
    batches = [range(start, start + given.batch_size) for start in range(0, given.samples, given.batch_size)]
    noise, sigma = torch.randn(given.batch_size, 3, side, side, device=device), torch.ones(given.batch_size)
    sigma = sigma.to(device)

    def whole(steps: int, folder: Path) -> None:
        draw = partial(sample, config.method, denoise, seed=0, steps=steps, shape=(3, side, side), device=device)
        with torch.no_grad():
            images = np.concatenate([as_array(draw(indices=indices), raw=False) for indices in batches])
        out = Place(str(folder / "samples.npz"))
        write_npz(out, images, count=len(images), shape=images.shape[1:], dtype="uint8", key="bench")
        write_grid(images[:256], Place(str(folder / "grid.png")))

    def bare(steps: int) -> None:
        with torch.inference_mode():
            for _ in range(steps * len(batches)):
                denoise(noise, sigma)

    clock = harness.clock_of(device)
    with harness.threads(given.threads), tempfile.TemporaryDirectory() as folder:
        actions: dict[str, harness.Action] = {}
        for steps in STEPS:
            actions[f"{steps} step{'s' * (steps > 1)}"] = harness.seconds(partial(whole, steps, Path(folder)), clock)
            actions[f"bare network, {steps}"] = harness.seconds(partial(bare, steps), clock)
        load = os.getloadavg()[0]
        found = harness.interleaved(actions, rounds=given.rounds)
    unit, kind = "images/s", "cpu" if device.type == "cpu" else "wall"
    rates = {name: [given.samples / value for value in values] for name, values in found.items()}
    rows = []
    for steps in STEPS:
        name = f"{steps} step{'s' * (steps > 1)}"
        rows.append(Row(name, unit, rates[name], f"bare network, {steps}", 0.9, kind))
        rows.append(Row(f"bare network, {steps}", unit, rates[f"bare network, {steps}"], clock=kind))
    facts = {"precision": config.engine.precision, "image_size": side, "num": given.samples, "batch": given.batch_size}
    return harness.report(given, rows, facts=facts, load=load)


if __name__ == "__main__":
    sys.exit(harness.run(main))
