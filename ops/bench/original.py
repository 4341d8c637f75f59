"""Runs the training step of the released code of Consistency Models from a checkout of it, for comparison.

The checkout's own classes compute the loss, the mixed precision, the optimizer and the averages, in the order of its
training loop. Packages that it imports and that the step does not need (mpi4py, blobfile) are replaced by empty
modules; flash-attn is replaced by PyTorch's attention, and einops, if it is missing, by the two patterns that are used.
"""

import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmscale.config import Config, Model
from cmscale.errors import UserError


class FlashAttention(nn.Module):
    """`flash_attn.flash_attention.FlashAttention` on PyTorch's attention: qkv [B, S, 3, heads, dim]."""

    def __init__(self, **ignored: Any) -> None:
        del ignored
        super().__init__()

    def forward(self, qkv: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        del ignored
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The two patterns of einops that the checkout uses."""
    if pattern == "b (three h d) s -> b s three h d":
        batch, width, length = x.shape
        parts = x.reshape(batch, sizes["three"], sizes["h"], width // (sizes["three"] * sizes["h"]), length)
        return parts.permute(0, 4, 1, 2, 3)
    assert pattern == "b s h d -> b (h d) s", pattern
    return x.flatten(2).transpose(1, 2)


def original_network(model: Model, *, half: bool = False) -> Any:
    """The checkout's network of a config; the checkout must be on `sys.path`."""
    from cm.script_util import create_model  # pyright: ignore[reportMissingImports]

    return create_model(
        image_size=model.image_size,
        num_channels=model.channels,
        num_res_blocks=model.num_res_blocks,
        channel_mult=",".join(map(str, model.channel_multipliers)),
        attention_resolutions=",".join(map(str, model.attention_resolutions)),
        num_head_channels=model.head_channels,
        use_scale_shift_norm=model.scale_shift_norm,
        resblock_updown=model.resblock_updown,
        dropout=model.dropout,
        use_checkpoint=model.activation_checkpointing,
        use_fp16=half,
    )


class OriginalStep:
    """A CT or CD step as `CMTrainLoop.run_step` makes it, on one device.

    Raises:
        UserError: the folder is no checkout of the released code, or the config's method is not CT.
    """

    def __init__(self, checkout: Path, config: Config, device: torch.device) -> None:
        if not (checkout / "cm" / "karras_diffusion.py").is_file():
            raise UserError(f"--original {checkout}: holds no cm/karras_diffusion.py; give a checkout of the code")
        if config.method.kind != "ct":
            raise UserError(f"--original: compares method.kind ct, not {config.method.kind}")
        _replace_missing()
        sys.path.insert(0, str(checkout))
        from cm.fp16_util import (  # pyright: ignore[reportMissingImports]
            MixedPrecisionTrainer,
            get_param_groups_and_shapes,
            make_master_params,
            master_params_to_model_params,
        )
        from cm.karras_diffusion import KarrasDenoiser  # pyright: ignore[reportMissingImports]
        from cm.nn import update_ema  # pyright: ignore[reportMissingImports]

        self._update_ema, self._to_model = update_ema, master_params_to_model_params
        self._half = config.engine.precision == "fp16"
        self._diffusion = KarrasDenoiser(
            sigma_data=0.5, weight_schedule="uniform", distillation=True, loss_norm=_distance(config)
        )
        self._network = self._build(config, device).train()
        self._target = self._build(config, device)
        self._target.load_state_dict(self._network.state_dict())
        if self._half:
            self._target.convert_to_fp16()
        self._target.requires_grad_(False).train()
        self._groups = get_param_groups_and_shapes(self._target.named_parameters()) if self._half else None
        self._target_masters = list(self._target.parameters())
        if self._half:
            self._target_masters = make_master_params(self._groups)
        self._trainer = MixedPrecisionTrainer(model=self._network, use_fp16=self._half, initial_lg_loss_scale=8.0)
        masters = self._trainer.master_params
        self._optimizer = torch.optim.RAdam(masters, lr=config.optimizer.learning_rate)
        self._averages = [[tensor.detach().clone() for tensor in masters] for _ in config.ema.rates]
        self._rates = config.ema.rates

    def _build(self, config: Config, device: torch.device) -> Any:
        return original_network(config.model, half=self._half).to(device)

    def __call__(self, micro_batches: list[Tensor], *, num_scales: int) -> None:
        """One step on micro-batches [B, 3, H, W] in [-1, 1]."""
        self._trainer.zero_grad()
        for images in micro_batches:
            found = self._diffusion.consistency_losses(self._network, images, num_scales, target_model=self._target)
            self._trainer.backward(found["loss"].mean())
        if not self._trainer.optimize(self._optimizer):
            return
        for average, rate in zip(self._averages, self._rates, strict=True):
            self._update_ema(average, self._trainer.master_params, rate=rate)
        with torch.no_grad():
            self._update_ema(self._target_masters, self._trainer.master_params, rate=0.95)
            if self._half:  # in fp32 the checkout's loop would mix flat and shaped parameters; nothing is to be copied
                self._to_model(self._groups, self._target_masters)


def _distance(config: Config) -> str:
    settings = config.method.distance_settings
    if settings is None or settings.name not in ("l1", "l2"):
        raise UserError("--original: compares method.distance l1 and l2; its LPIPS downloads weights")
    return settings.name


def _replace_missing() -> None:
    """Puts stand-ins for packages that are not installed into `sys.modules`."""
    stand_ins: dict[str, dict[str, Any]] = {
        "mpi4py": {"MPI": types.SimpleNamespace(COMM_WORLD=types.SimpleNamespace(Get_rank=lambda: 0))},
        "blobfile": {},
        "flash_attn": {},
        "flash_attn.flash_attention": {"FlashAttention": FlashAttention},
        "einops": {"rearrange": rearrange},
        "piq": {"LPIPS": object},
    }
    for name, content in stand_ins.items():
        if not name.startswith("flash_attn"):
            try:
                __import__(name)
                continue
            except ImportError:
                pass
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
