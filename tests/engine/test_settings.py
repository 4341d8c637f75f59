"""DeepSpeed's config, precisions that are refused, and the guarded step of an unwrapped optimizer."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from flat_state import flat_config

from cmscale.engine import settings
from cmscale.engine.optimizer import GuardedStep, build_optimizer
from cmscale.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU computes in fp16")
def test_fp16_on_a_cpu_without_it_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"engine.precision: fp16 does not run on this machine's CPU; use fp32"):
        settings.check_precision(flat_config("engine.precision=fp16"), CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_and_bf16_are_allowed_on_cpus(precision: str) -> None:
    settings.check_precision(flat_config(f"engine.precision={precision}"), CPU)


@pytest.mark.parametrize(("generation", "has_bf16"), [(7, False), (8, True)])
def test_bf16_is_refused_on_gpus_that_would_emulate_it(
    generation: int, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # so of a T4
    refused = nullcontext() if has_bf16 else pytest.raises(UserError, match=r"engine\.precision: this GPU has no bf16")
    with refused:
        settings.check_precision(flat_config("engine.precision=bf16"), torch.device("cuda"))


def test_deepspeeds_config_has_the_batch_as_the_config_divides_it() -> None:
    found = settings.deepspeed_settings(flat_config(), num_ranks=2, num_elements=101, device=CPU)
    assert found["train_batch_size"] == 8
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 2
    assert found["zero_optimization"]["allgather_bucket_size"] == 102


def guarded(clip: float | None) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = build_optimizer(flat_config("optimizer.kind=adam").optimizer, [parameter])
    GuardedStep(optimizer, clip=clip)
    return parameter, optimizer


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_applied(bad: float) -> None:
    parameter, optimizer = guarded(clip=None)
    parameter.grad = torch.tensor([bad, 1.0])
    optimizer.step()
    assert optimizer.overflow  # pyright: ignore[reportAttributeAccessIssue]
    assert parameter.tolist() == [1.0, 2.0]
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert not optimizer.overflow  # pyright: ignore[reportAttributeAccessIssue]
    assert optimizer._global_grad_norm == 5.0  # pyright: ignore[reportAttributeAccessIssue]
    assert parameter.tolist() != [1.0, 2.0]


def test_a_large_gradient_is_clipped_to_the_norm_and_a_small_one_is_not() -> None:
    parameter, optimizer = guarded(clip=1.0)
    for gradient, length in (([3.0, 4.0], 1.0), ([0.03, 0.04], 0.05)):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        assert parameter.grad.norm().item() == pytest.approx(length, rel=1e-5)
