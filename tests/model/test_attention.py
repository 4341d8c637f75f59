"""Tests that the attention implementations agree, and that selecting one that can't run is an error."""

import numpy as np
import pytest
import torch
from networks import relative

from cmscale.errors import UserError
from cmscale.model import attention
from cmscale.model.attention import attend, choose_attention, split_qkv

CUDA = torch.device("cuda")


def random_qkv(*, heads: int = 3, dim: int = 16, length: int = 25, device: str = "cpu") -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return [2 * torch.randn(2, length, heads, dim, generator=source).to(device) for _ in range(3)]


def numpy_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> np.ndarray:
    q, k, v = (part.double().cpu().numpy() for part in (query, key, value))
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
    return np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("kind", ["sdpa", "reference", "auto"])
def test_attention_is_its_formula(kind):
    parts = random_qkv()
    assert relative(attend(*parts, kind=kind), numpy_attention(*parts)) < 2e-6


def test_gradients_of_sdpa_are_those_of_the_reference():
    gradients = []
    for kind in ("sdpa", "reference"):
        parts = [part.requires_grad_() for part in random_qkv()]
        (attend(*parts, kind=kind) ** 2).sum().backward()
        gradients.append([part.grad for part in parts])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_computes_in_float32_and_gives_the_inputs_dtype(dtype):
    parts = [part.to(dtype) for part in random_qkv()]
    found = attend(*parts, kind="reference")
    assert found.dtype == dtype
    assert torch.equal(found, attend(*(part.float() for part in parts), kind="reference").to(dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers runs on CUDA only, there is no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_xformers_agrees_with_the_reference(dtype, tolerance):
    gradients, outputs = [], []
    for kind in ("xformers", "reference"):
        parts = [part.to(dtype).requires_grad_() for part in random_qkv(dim=64, length=256, device="cuda")]
        output = attend(*parts, kind=kind)
        output.float().square().sum().backward()
        outputs.append(output.detach().float().cpu())
        gradients.append([part.grad.float().cpu() for part in parts])
    assert relative(*outputs) < tolerance
    assert all(relative(a, b) < 4 * tolerance for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("layout", "place"), [("three_heads_dim", (0, 1, 2)), ("heads_three_dim", (1, 0, 2))])
def test_qkv_is_split_in_the_order_of_its_layout(layout, place):
    channels = np.arange(3 * 2 * 4).reshape(3, 2, 4).transpose(place)  # the value says part, head, dim
    qkv = torch.tensor(channels.reshape(1, 24, 1).copy()).expand(1, 24, 5)
    for part, tensor in enumerate(split_qkv(qkv, num_heads=2, layout=layout)):
        assert tensor.shape == (1, 5, 2, 4)
        assert tensor[0, 3].tolist() == np.arange(24).reshape(3, 2, 4)[part].tolist()


def test_xformers_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "xformers_ops", lambda: None)
    with pytest.raises(UserError, match="can't be imported"):
        choose_attention("xformers", CUDA)


def test_xformers_on_a_cpu_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"xformers runs on CUDA only, not on cpu; use auto or sdpa"):
        attend(*random_qkv(), kind="xformers")
