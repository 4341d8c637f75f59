"""Tests of compiled blocks: equal results, nothing compiled again, unchanged names of parameters.

Most take a backend that generates no machine code, so that they need no compiler; it counts what it is given.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import random_weights, small_model
from torch._inductor.utils import run_and_get_code

from cmscale.config import CT
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.distance import l2
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.engine.one_tensor import OneTensor
from cmscale.errors import UserError
from cmscale.model import UNet, build_unet, denoiser_for
from cmscale.model.blocks import GroupNorm
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


@pytest.mark.long
def test_joined_parameters_whose_views_are_new_in_each_step_compile_nothing_again(backend: Counting) -> None:
    plain, compiled = network_with(**SMALL), network_with(**SMALL)
    compile_blocks(compiled, backend=backend)
    joined = OneTensor(compiled)
    slopes = []
    for number in range(3):
        joined.flat.grad = None
        x, c_noise = batch()
        joined(x + number, c_noise).square().mean().backward()
        assert joined.flat.grad is not None
        slopes.append(joined.flat.grad.clone())
        if number == 0:
            count = backend.count
    assert count > 0
    assert backend.count == count
    x, c_noise = batch()
    plain(x + 2, c_noise).square().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in plain.parameters() if parameter.grad is not None])
    assert (slopes[2] - expected).norm() <= 1e-6 * expected.norm()


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler of C++")
@pytest.mark.slow
def test_norm_scale_shift_and_silu_are_one_kernel_that_reads_and_writes_half_precision() -> None:
    """Forward no float32 copy of the activations is made; backward is one kernel too, with two of them."""
    norm = GroupNorm(64).to(torch.bfloat16)
    for name in ("weight", "bias"):
        norm.set_value(name, torch.rand(64))
    source = torch.Generator().manual_seed(1)
    shapes = {"x": (2, 64, 8, 8), "scale": (2, 64, 1, 1), "shift": (2, 64, 1, 1)}
    inputs = {name: torch.randn(shape, generator=source).bfloat16() for name, shape in shapes.items()}

    def body(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return F.silu(norm(x) * (1 + scale) + shift)

    compiled = torch.compile(body, fullgraph=True)

    def both(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = inputs["x"].clone().requires_grad_()
        output = function(**inputs | {"x": x})
        output.sum().backward()
        assert x.grad is not None
        return output.detach(), x.grad

    torch._dynamo.reset()
    found, codes = run_and_get_code(lambda: both(compiled))
    for ours, torchs in zip(found, both(body), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2**-6, atol=2**-6)
    forward, backward = codes
    assert [len(re.findall(r"^ +cpp_fused\w+\(", code, re.MULTILINE)) for code in codes] == [1, 1]
    assert not any("extern_kernels." in code.partition("def call")[2] for code in codes)
    assert large_buffers(forward, 2 * 64 * 8 * 8) == ["bfloat16"]
    assert sorted(large_buffers(backward, 2 * 64 * 8 * 8)) == ["bfloat16", "float32", "float32"]
    torch._dynamo.reset()


def large_buffers(code: str, size: int) -> list[str]:
    """The dtypes of the buffers of at least `size` elements that generated code allocates."""
    found = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\), \([\d, ]+\), torch\.(\w+)\)", code)
    return [
        dtype for shape, dtype in found if math.prod(int(part) for part in shape.split(",") if part.strip()) >= size
    ]


@pytest.mark.parametrize(("device", "missing"), [("cpu", r"C\+\+"), ("cuda", "Triton")])
def test_a_machine_that_can_compile_nothing_is_named_before_training(
    device: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if device == "cpu" else f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"model.compile: blocks needs .*{missing}.*use off"):
        check_compiler(torch.device(device))
