"""On CUDA the host waits for nothing in a step until the last backward pass has begun, as CUDA itself sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parents[2]
STEP = """
import sys
import torch
import train_step
from cmscale.config import parse_config, schedules

KEYS = ["model.image_size=16", "model.channels=32", "model.channel_multipliers=[1,2]", "model.head_channels=32"]
KEYS += ["model.num_res_blocks=1", "model.attention_resolutions=[8]", "model.dropout=0.1", "train.micro_batch_size=4"]
config = parse_config(train_step.SMALL, [*KEYS, *sys.argv[2:]])
with train_step.alone(sys.argv[1], 1) as world:
    step = train_step.make_step(config, world)
    for _ in range(2):
        step()
    values = schedules.at(config, 1)
    *first, last = step.parts.micro_losses(step.batch, values)

    def mode(name):
        if world.device.type == "cuda":
            torch.cuda.set_sync_debug_mode(name)

    def computed():
        loss = last()
        loss.register_hook(lambda gradient: mode("default"))
        return loss

    mode("error")
    assert step.parts.engine.step([*first, computed], 1e-4).applied
print("no waiting")
"""


def run(device: str, *keys: str) -> subprocess.CompletedProcess[str]:
    paths = [str(CHECKOUT / "ops" / "bench"), str(CHECKOUT)]
    program = f"import sys; sys.path[:0] = {paths}\n{STEP}"
    command = [sys.executable, "-c", program, device, *keys]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("keys", [("engine.zero_stage=2", "engine.precision=bf16"), ("engine.zero_stage=0",)])
def test_nothing_waits_for_the_device(keys: tuple[str, ...]) -> None:
    done = run("cuda", *keys)
    assert done.stdout.endswith("no waiting\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_the_same_step_runs_on_a_cpu() -> None:
    done = run("cpu", "engine.zero_stage=2", "engine.precision=bf16")
    assert done.stdout.endswith("no waiting\n"), done.stdout + done.stderr
