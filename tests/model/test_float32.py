"""Tests of the layers that compute in float32 in a bf16 or fp16 network, against the released code's layout."""

import copy

import pytest
import torch
from networks import random_weights, small_model

from cmscale.config import Model
from cmscale.model import ConsistencyDenoiser, build_unet
from cmscale.model.float32 import Conv2d, Linear, set_values, value_names


def network_of(layout: str, dtype: torch.dtype, *, exact: bool = False) -> torch.nn.Module:
    """A network rounded to a dtype; with `exact`, its float32 layers have the values before rounding."""
    model = small_model(precision_layout=layout)
    network = build_unet(model).eval().requires_grad_(False)
    weights = random_weights(model)
    network.load_state_dict(weights)
    network.to(dtype)
    if exact:
        set_values(network, {name: weights[name] for name in network.float32_parameters})
    return network


class Released(torch.nn.Module):
    """The released layout: 3x3 and 1x1 convolutions but the last are in the dtype, everything else in float32."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = build_unet(model).eval().requires_grad_(False)
        self.network.load_state_dict(random_weights(model))
        for name, module in self.network.named_modules():
            if isinstance(module, torch.nn.Conv2d) and not name.startswith("out."):
                module.to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, **keywords: object) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.network), "dtype", property(lambda _: self.dtype))
            return self.network(x, c_noise, **keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_released_layout_is_the_released_codes(dtype: torch.dtype):
    """Bit for bit what convolutions in the dtype and all else in float32 give."""
    model = small_model()
    assert model.precision_layout == "released"
    x, c_noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.linspace(-1500, 1095, 4)
    found = network_of("released", dtype, exact=True)(x, c_noise)
    assert found.dtype == torch.float32
    assert torch.equal(found, Released(model, dtype)(x, c_noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.long
def test_its_error_is_below_that_of_a_network_rounded_as_a_whole(dtype: torch.dtype):
    sigma = torch.tensor([0.1, 1.0, 5.0, 80.0]).repeat(2)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * (sigma + 0.5)[:, None, None, None]
    exact = ConsistencyDenoiser(network_of("released", torch.float32))(x, sigma)

    def error(network: torch.nn.Module) -> torch.Tensor:
        difference = ConsistencyDenoiser(network)(x, sigma) - exact
        return difference.square().flatten(1).mean(1).reshape(2, 4).mean(0).sqrt()

    whole, released = error(network_of("uniform", dtype)), error(network_of("released", dtype, exact=True))
    assert (released[1:] < 0.97 * whole[1:]).all(), (released, whole)


def test_in_float32_both_layouts_are_the_same_network():
    x, c_noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, -40.0])
    released, uniform = (network_of(layout, torch.float32) for layout in ("released", "uniform"))
    assert torch.equal(released(x, c_noise), uniform(x, c_noise))
    assert released.state_dict().keys() == uniform.state_dict().keys()
    assert uniform.float32_parameters == ()


@pytest.mark.parametrize("layer", [Linear(3, 2), Conv2d(3, 2, 1)])
def test_the_gradient_of_an_exact_value_reaches_the_rounded_parameter(layer: torch.nn.Module):
    exact = copy.deepcopy(layer)
    layer.to(torch.bfloat16)
    set_values(layer, {})
    for name, parameter in exact.named_parameters():
        layer.set_value(name, parameter.detach())
    x = torch.randn(4, 3, 1, 1) if isinstance(layer, Conv2d) else torch.randn(4, 3)
    outputs = layer(x), exact(x)
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, parameter), expected in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.bfloat16, name
        assert torch.equal(parameter.grad, expected.grad.bfloat16()), name
    assert value_names(torch.nn.Sequential(layer)) == ("0.weight", "0.bias")
