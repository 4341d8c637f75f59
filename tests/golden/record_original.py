"""Records tests/golden/original_losses.json with the original code: python tests/golden/record_original.py CHECKOUT.

CHECKOUT is a clone of https://github.com/openai/consistency_models (recorded with e32b69e). Its training loop, losses,
network and optimizer run unchanged on a CPU in float32; packages for GPUs and clusters are replaced by stand-ins.
"""

import contextlib
import json
import os
import sys
import types
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from original_training import AVERAGE, BATCH, METHODS, MODEL, RATE, TOTAL_STEPS, batches, first_weights  # noqa: E402

from cmscale.config import CT  # noqa: E402
from cmscale.consistency.grid import uniform_index  # noqa: E402
from cmscale.rng import SampleRandomness  # noqa: E402
from ops.bench.original import FlashAttention, original_network, rearrange  # noqa: E402


def stand_in(name: str, **members: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


@contextlib.contextmanager
def drawn(indices: Tensor):
    """torch.randint gives `indices`."""
    original, torch.randint = torch.randint, lambda *arguments, **options: indices
    try:
        yield
    finally:
        torch.randint = original


def network() -> nn.Module:
    found = original_network(MODEL)
    found.load_state_dict(first_weights())
    found.convert_to_fp16 = lambda: None  # the master weights of its 16-bit training, without the 16 bits
    return found


def recorded(kind: str) -> list[float]:
    from cm.karras_diffusion import KarrasDenoiser
    from cm.script_util import create_ema_and_scales_fn
    from cm.train_util import CMTrainLoop

    method = METHODS[kind]
    training = isinstance(method, CT)
    diffusion = KarrasDenoiser(distillation=True, weight_schedule="uniform", loss_norm="l2")
    schedule = create_ema_and_scales_fn(
        target_ema_mode="adaptive" if training else "fixed",
        start_ema=method.mu0 if isinstance(method, CT) else AVERAGE,
        scale_mode="progressive" if training else "fixed",
        start_scales=method.s0 if isinstance(method, CT) else method.num_scales,
        end_scales=method.s1 if isinstance(method, CT) else method.num_scales,
        total_steps=TOTAL_STEPS,
        distill_steps_per_iter=TOTAL_STEPS,
    )
    loop = CMTrainLoop(
        model=network(),
        target_model=network(),
        teacher_model=None if training else network(),
        teacher_diffusion=None if training else KarrasDenoiser(distillation=False, loss_norm="l2"),
        training_mode="consistency_training" if training else "consistency_distillation",
        ema_scale_fn=schedule,
        total_training_steps=TOTAL_STEPS,
        diffusion=diffusion,
        data=None,
        batch_size=BATCH,
        microbatch=-1,
        lr=RATE,
        ema_rate="0.9999",
        log_interval=1,
        save_interval=-1,
        resume_checkpoint="",
        use_fp16=True,
        fp16_scale_growth=0.0,
    )
    found: list[float] = []
    original = diffusion.consistency_losses

    def losses(random: SampleRandomness, model: nn.Module, x: Tensor, num_scales: int, **options: object):
        indices = num_scales - 1 - uniform_index(random.uniform(), num_scales)  # its grid descends
        with drawn(indices):
            terms = original(model, x, num_scales, noise=random.noise(x.shape[1:]), **options)
        found.append(terms["loss"].mean().item())
        return terms

    for images, random in batches():
        diffusion.consistency_losses = partial(losses, random)
        loop.run_step(images, {})
    return found


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    os.environ["OPENAI_LOG_FORMAT"] = ""
    stand_in("blobfile")
    stand_in("mpi4py", MPI=None)
    stand_in("piq", LPIPS=None)
    stand_in("einops", rearrange=rearrange)
    stand_in("flash_attn")
    stand_in("flash_attn.flash_attention", FlashAttention=FlashAttention)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = {kind: recorded(kind) for kind in METHODS}
    (Path(__file__).parent / "original_losses.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
