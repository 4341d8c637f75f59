"""Builds the optimizers, and guards the one that DeepSpeed does not wrap against bad gradients."""

import math
from collections.abc import Iterable

import torch

from cmscale.config import Optimizer


def build_optimizer(settings: Optimizer, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """RAdam or Adam over the parameters. The engine sets the learning rate at every step."""
    kind = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}[settings.kind]
    return kind(
        list(parameters),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


class GuardedStep:
    """Replaces `optimizer.step` where DeepSpeed has no wrapper (stage 0, fp32) and does what its wrappers do.

    It computes the gradient's norm, clips by it, and makes no step if the norm is not finite.

    Attributes:
        applied: whether the last step updated the weights.
        norm: the last gradient's Euclidean norm, before clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, clip: float | None) -> None:
        self._optimizer = optimizer
        self._apply = optimizer.step
        self._clip = clip
        self.applied = False
        self.norm = 0.0
        optimizer.step = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self) -> None:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.norm = float(norm)
        self.applied = math.isfinite(self.norm)
        # DeepSpeed's engine reads these two for its own counts of steps.
        self._optimizer._global_grad_norm = self.norm  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.overflow = not self.applied  # pyright: ignore[reportAttributeAccessIssue]
        if not self.applied:
            return
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        self._apply()
