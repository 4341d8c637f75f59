"""No loss makes the host wait for the device by a copy that blocks; the meta device stands in for it.

Reading a value would fail there, too, as there are none.
"""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cmscale.config import parse_config
from cmscale.training.estimate.counts import on_meta

TEXT = """
method: METHOD
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, head_channels: 32, dropout: 0.1}
data: {path: nowhere}
optimizer: {learning_rate: 1e-3}
train: {total_steps: 1000, global_batch_size: 8, micro_batch_size: 2}
ema: {rates: [0.9]}
engine: {zero_stage: 2, precision: bf16}
"""
METHODS = [
    "{kind: edm}",
    "{kind: ct}",
    "{kind: ct, distance: l2}",
    "{kind: cd, teacher: t, distance: l2}",
    "{kind: ict}",
    "{kind: ect, teacher: t}",
    "{kind: sct}",
    "{kind: scd, teacher: t}",
    "{kind: pd, teacher: t, distance: l2}",
    "{kind: mcd, teacher: t}",
]


class Blocking(TorchFunctionMode):
    """Notes copies from the host to the device for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if isinstance(out, torch.Tensor) and out.is_meta:
            tensors = [each for each in args if isinstance(each, torch.Tensor)]
            made = name in {"tensor", "as_tensor"} and not any(each.is_meta for each in tensors)
            moved = name in {"to", "copy_", "cuda"} and not all(each.is_meta for each in tensors)
            if made or (moved and not any(each is True for each in (*args, kwargs.get("non_blocking")))):
                self.found.append(f"{name}{args}")
        return out


@pytest.mark.parametrize("method", METHODS)
def test_no_copy_of_a_loss_makes_the_host_wait(method: str) -> None:
    prepared = on_meta(parse_config(TEXT.replace("METHOD", method)), size=2, activation_checkpointing=False)
    prepared.compute()  # constants are copied once
    with Blocking() as blocking:
        prepared.compute()
    assert blocking.found == []


def test_blocking_copies_are_found() -> None:
    with Blocking() as blocking:
        torch.tensor(1.0, device="meta")
        torch.zeros(2).to("meta")
        torch.zeros(2).to("meta", non_blocking=True)
        torch.zeros(2, device="meta")
    assert len(blocking.found) == 2
