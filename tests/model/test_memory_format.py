"""Tests of channels-last activations: every convolution gets them, results are equal, parameters stay as they are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import VARIANTS, random_weights, small_model
from torch import Tensor, nn

from cmscale.model import UNet, build_unet

ORDERS = ("contiguous", "channels_last")


def results(network: UNet, *, classes: int | None) -> tuple[Tensor, Tensor, list[bool]]:
    """The output, all gradients, and whether each convolution over more than one pixel got channels-last input."""
    found: list[bool] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        del module
        if given[0].shape[2:] != (1, 1):
            found.append(given[0].is_contiguous(memory_format=torch.channels_last))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    source = torch.Generator().manual_seed(5)
    side = network.model.image_size
    x = torch.randn(2, 3, side, side, generator=source)
    labels = None if classes is None else torch.tensor([0, 3])
    output = network(x, torch.linspace(-500, 500, 2), labels=labels)
    output.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert all(gradient.is_contiguous() for gradient in gradients)  # as the flat space of the engine needs them
    return output.detach(), torch.cat([gradient.flatten() for gradient in gradients]).float(), found


def networks(variant: str, **changes: Any) -> list[UNet]:
    """The same network in both orders."""
    found = []
    for order in ORDERS:
        model = small_model(variant, memory_format=order, **changes)
        network = build_unet(model).train()
        network.load_state_dict(random_weights(model))
        found.append(network)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_last_changes_nothing_but_the_order_of_activations(variant: str) -> None:
    first, last = networks(variant)
    assert {name: (p.shape, p.stride()) for name, p in first.named_parameters()} == {
        name: (p.shape, p.stride()) for name, p in last.named_parameters()
    }
    classes = first.model.num_classes
    (output, gradients, before), (found, slopes, after) = (results(each, classes=classes) for each in (first, last))
    torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
    assert (slopes - gradients).norm() <= 1e-5 * gradients.norm()
    assert all(after)
    assert not all(before)


def test_the_order_survives_a_normalisation_that_returns_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel for CUDA does."""
    plain = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda *args: plain(*args).contiguous())
    for network in networks("as LSUN 256")[1:]:
        *_, found = results(network.to(torch.bfloat16), classes=None)
        assert all(found)
