"""Owns the optimizers: torch's RAdam and Adam, and the one that refuses a bad gradient by itself."""

import math
from collections.abc import Iterable

import torch

from cmscale.config import Optimizer


def build_optimizer(settings: Optimizer, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """RAdam or Adam over the parameters. The learning rate is set anew at every step."""
    kind = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}[settings.kind]
    return kind(
        list(parameters),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


class GuardedStep:
    """What DeepSpeed's wrappers do, for the optimizer that it leaves unwrapped (stage 0, fp32).

    Replaces `optimizer.step`: computes the gradient's norm, clips by it, and applies no step whose norm is
    not finite.
    DeepSpeed reads `overflow` and `_global_grad_norm` from the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, clip: float | None) -> None:
        self._optimizer = optimizer
        self._apply = optimizer.step
        self._clip = clip
        optimizer.step = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self) -> None:
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        self._optimizer._global_grad_norm = value  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.overflow = not math.isfinite(value)  # pyright: ignore[reportAttributeAccessIssue]
        if not math.isfinite(value):
            return
        if self._clip is not None:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        self._apply()
