"""Tests of compiled blocks: equal results, nothing compiled again, unchanged names of parameters.

Most take a backend that generates no machine code, so that they need no compiler; it counts what it is given.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import random_weights, small_model

from cmscale.config import CT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.distance import l2
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.errors import UserError
from cmscale.model import UNet, build_unet, denoiser_for
from cmscale.model.compiled import check_compiler, compile_blocks, uncompiled
from cmscale.rng import PhiloxKeys, PhiloxRandomness

SMALL = {"image_size": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": (8,)}


class Counting:
    """A backend of torch.compile that differentiates, and runs what it was given by torch itself."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def backend() -> Iterator[Counting]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests may have counted
    yield Counting()
    torch._dynamo.reset()


def network_with(**changes: Any) -> UNet:
    model = small_model(**changes)
    network = build_unet(model).train()
    network.load_state_dict(random_weights(model))
    return network


def batch(size: int = 2, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    return torch.randn(size, 3, side, side, generator=source), torch.linspace(-500, 500, size)


def results(network: UNet, x: torch.Tensor, c_noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and all gradients of its mean square."""
    network.zero_grad()
    output = network(x, c_noise, dropout_keys=PhiloxKeys(3, tuple(range(len(x))), x.device))
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True, "scale_shift_norm": True, "dropout": 0.3, "memory_format": "channels_last"},
        pytest.param({"channel_multipliers": (1, 2), "precision_layout": "uniform"}, marks=pytest.mark.slow),
    ],
    ids=["small", "two levels"],
)
@pytest.mark.long
def test_compiled_blocks_compute_what_uncompiled_ones_do(changes: dict[str, Any], backend: Counting) -> None:
    plain, compiled = (network_with(**SMALL | changes) for _ in range(2))
    names = list(compiled.state_dict())
    compile_blocks(compiled, backend=backend)
    assert list(compiled.state_dict()) == names
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        (output, gradients), (found, slopes) = (results(each.to(dtype), *batch()) for each in (plain, compiled))
        torch.testing.assert_close(found, output, rtol=tolerance, atol=tolerance)
        assert (slopes - gradients).norm() <= tolerance * gradients.norm()
    assert backend.count > 0


@pytest.mark.long
def test_nothing_is_compiled_again_when_schedules_times_or_modes_change(backend: Counting) -> None:
    student, target = (network_with(**SMALL) for _ in range(2))
    target.requires_grad_(False)
    for network in (student, target):
        compile_blocks(network, backend=backend)
    method = CT(kind="ct", distance="l2")
    networks = Networks(denoiser_for(method, student), denoiser_for(method, target))
    loss = build_loss(method, l2)
    clean, _ = batch()

    def step(number: int, num_scales: int) -> float:
        random = PhiloxRandomness(number, (2 * number, 2 * number + 1), torch.device("cpu"))
        value = loss(networks, clean, ScheduleValues(number, 1.0, num_scales=num_scales, target_ema=0.9), random).mean()
        value.backward()
        return value.item()

    losses = [step(0, 2)]
    count = backend.count
    assert count > 0
    losses += [step(number, num_scales) for number, num_scales in enumerate((2, 3, 17, 151), start=1)]
    for network in (student, target):
        network.eval()
    losses.append(step(9, 151))
    for network in (student, target):
        network.train()
    losses.append(step(10, 151))
    assert len(set(losses)) == len(losses)
    assert backend.count == count
    with uncompiled(), torch.no_grad():  # samples: another batch size
        student(*batch(3))
    assert backend.count == count
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler of C++")
@pytest.mark.slow
def test_generated_code_computes_what_torch_does() -> None:
    torch._dynamo.reset()
    plain, compiled = (network_with(**SMALL) for _ in range(2))
    compile_blocks(compiled)
    (output, gradients), (found, slopes) = (results(each, *batch()) for each in (plain, compiled))
    torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
    assert (slopes - gradients).norm() <= 1e-5 * gradients.norm()
    torch._dynamo.reset()


@pytest.mark.parametrize(("device", "missing"), [("cpu", r"C\+\+"), ("cuda", "Triton")])
def test_a_machine_that_can_compile_nothing_is_named_before_training(
    device: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if device == "cpu" else f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"model.compile: blocks needs .*{missing}.*use off"):
        check_compiler(torch.device(device))
