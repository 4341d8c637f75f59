"""Translates the config into DeepSpeed's, and refuses a precision that the device lacks."""

from typing import Any

import torch

from cmscale.config import Config, accumulation_steps
from cmscale.distributed.compat import cpu_has_bf16, cpu_has_fp16
from cmscale.errors import UserError

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_BUCKET = 100_000_000  # elements; DeepSpeed's 5e8 would take 2 GB per buffer, whatever the network's size


def check_precision(config: Config, device: torch.device) -> None:
    """Checks that the device computes in the config's precision.

    Raises:
        UserError: the precision is fp16 or bf16 and the device lacks it.
    """
    precision = config.engine.precision
    if precision == "fp16" and device.type == "cpu" and not cpu_has_fp16():
        raise UserError("engine.precision: fp16 does not run on this machine's CPU; use fp32 or bf16, or a GPU")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("engine.precision: this GPU has no bf16 (torch would emulate it, slowly); use fp16 or fp32")


def precision_cautions(config: Config, device: torch.device) -> list[str]:
    """One line if the device computes in the config's precision, but much slower than in fp32."""
    if config.engine.precision != "bf16" or device.type != "cpu" or cpu_has_bf16():
        return []
    return [
        "engine.precision: bf16 is emulated on this machine's CPU, which has no instructions for it: a step can take "
        "ten times as long as in fp32; set engine.precision=fp32"
    ]


def deepspeed_settings(config: Config, *, num_ranks: int, num_elements: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's config for the network that is trained.

    Gradients are sent and reduced in fp32 in every precision. Stages 2 and 3 also accumulate micro-batches and keep
    the mean in fp32. Stages 0 and 1 do both in the compute dtype: DeepSpeed 0.19.8 has fp32 there only together with
    an optimizer (`BF16_Optimizer`) that applies non-finite gradients.
    """
    stage = config.engine.zero_stage
    settings = _common(config, num_elements=num_elements, device=device)
    settings |= {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, num_ranks=num_ranks),
        # At stage 0 in fp32 DeepSpeed wraps nothing: `GuardedStep` clips, and skips bad steps.
        "gradient_clipping": 0.0 if is_plain(config) else (config.engine.gradient_clip or 0.0),
    }
    if stage >= 2:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def frozen_settings(config: Config, *, num_elements: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's config for a network that is evaluated only, which stage 3 partitions too."""
    return _common(config, num_elements=num_elements, device=device) | {"train_micro_batch_size_per_gpu": 1}


def is_plain(config: Config) -> bool:
    """Whether DeepSpeed runs the torch optimizer without a wrapper: nothing partitioned, no low precision."""
    return config.engine.zero_stage == 0 and config.engine.precision == "fp32"


def _common(config: Config, *, num_elements: int, device: torch.device) -> dict[str, Any]:
    precision = config.engine.precision
    bucket = min(LARGEST_BUCKET, num_elements + num_elements % 2)  # DeepSpeed requires an even number
    return {
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "round_robin_gradients": False,  # it would reorder the flat space
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # 0: every parameter is partitioned, so that writing its partition writes the parameter
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 10**12,
            "log_trace_cache_warnings": False,
        },
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": config.engine.initial_loss_scale_power,
            "hysteresis": 1,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
