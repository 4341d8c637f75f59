"""Tests that keyed dropout depends only on sample and layer, and is repeated by activation checkpointing."""

from functools import partial

import pytest
import torch
from networks import random_weights, small_model

from cmscale.model import UNet, build_unet
from cmscale.model.blocks import ResBlock, keyed_dropout
from cmscale.rng import PhiloxKeys

KEYS = (11, 22, 33)
EVERY_KIND = pytest.mark.parametrize(
    "kind", [tuple, partial(PhiloxKeys, 7, device=torch.device("cpu"))], ids=["numbers", "philox"]
)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


def network_with(**changes) -> UNet:
    model = small_model(**changes)
    network = build_unet(model).train()
    network.load_state_dict(random_weights(model))
    return network


def batch(size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    return torch.randn(size, 3, 16, 16, generator=source), torch.linspace(-500, 500, size)


@pytest.mark.parametrize("philox", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_student_and_target_drop_the_same_elements(device, philox):
    ones = torch.ones(3, 32, 8, 8, device=device)
    keys = PhiloxKeys(7, KEYS, torch.device(device)) if philox else KEYS
    student = keyed_dropout(ones, 0.3, keys=keys, layer=2)
    target = keyed_dropout(7 * ones, 0.3, keys=keys, layer=2)
    halved = keyed_dropout(ones.bfloat16(), 0.3, keys=keys, layer=2)
    assert torch.equal(student == 0, target == 0)
    assert torch.equal(student == 0, halved == 0)


@EVERY_KIND
def test_the_mask_of_a_sample_depends_on_its_key_and_layer_alone(kind):
    ones = torch.ones(3, 32, 8, 8)
    together = keyed_dropout(ones, 0.3, keys=kind(KEYS), layer=2)
    torch.manual_seed(99)
    alone = keyed_dropout(ones[:1], 0.3, keys=kind(KEYS[1:2]), layer=2)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0] == 0, together[1] == 0)
    assert not torch.equal(together, keyed_dropout(ones, 0.3, keys=kind(KEYS), layer=3))


@EVERY_KIND
def test_dropout_keeps_the_mean_and_drops_at_its_rate(kind):
    count = 3 * 32 * 64 * 64
    dropped = keyed_dropout(torch.ones(3, 32, 64, 64), 0.3, keys=kind(KEYS), layer=0)
    rate = (dropped == 0).double().mean().item()
    assert abs(rate - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / 0.7))


@EVERY_KIND
def test_keys_of_another_batch_size_are_refused(kind):
    with pytest.raises(ValueError, match="2 keys for a batch of 3"):
        keyed_dropout(torch.ones(3, 1), 0.3, keys=kind((1, 2)), layer=0)


@EVERY_KIND
def test_a_network_drops_by_key_in_training_and_never_without_keys_or_in_evaluation(kind):
    network = network_with(dropout=0.5)
    x, c_noise = batch()
    keys = kind(KEYS)
    with torch.no_grad():
        dropped = network(x, c_noise, dropout_keys=keys)
        again = network(x, c_noise, dropout_keys=keys)
        plain = network(x, c_noise)
        evaluated = network.eval()(x, c_noise, dropout_keys=keys)
    assert torch.equal(dropped, again)
    assert torch.equal(plain, evaluated)
    assert not torch.allclose(dropped, plain, atol=1e-2)


def test_every_residual_block_has_a_mask_of_its_own():
    network = network_with(dropout=0.5)
    layers = [module.layer for module in network.modules() if hasattr(module, "layer")]
    assert sorted(layers) == list(range(len(layers)))
    assert len(layers) == 14  # 2 levels: 5 down, 2 in the middle, 7 up


@EVERY_KIND
def test_activation_checkpointing_changes_no_bit_of_loss_and_gradients(kind):
    x, c_noise = batch()
    gradients = []
    for checkpointing in (False, True):
        network = network_with(dropout=0.5, activation_checkpointing=checkpointing)
        loss = network(x, c_noise, dropout_keys=kind(KEYS)).square().mean()
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_activation_checkpointing_keeps_fewer_activations():
    x, c_noise = batch()
    kept = []
    for checkpointing in (False, True):
        network = network_with(activation_checkpointing=checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            network(x, c_noise)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_dropout_happens_at_the_listed_resolutions_alone():
    """The size of a block is that of its output, where it drops, so that a block that halves 16 to 8 px drops at 8."""
    model = small_model(image_size=32, channel_multipliers=(1, 1, 2), dropout=0.5, dropout_resolutions=(16, 8))
    network = build_unet(model).train()
    network.load_state_dict(random_weights(model))
    sizes: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: sizes.__setitem__(name, out.shape[-1]))
        for name, module in network.named_modules()
        if isinstance(module, ResBlock)
    ]
    source = torch.Generator().manual_seed(5)
    x, c_noise = torch.randn(2, 3, 32, 32, generator=source), torch.zeros(2)
    with torch.no_grad():
        network(x, c_noise, dropout_keys=KEYS[:2])
    assert len(hooks) == len(sizes)
    rates = {name: module.dropout for name, module in network.named_modules() if isinstance(module, ResBlock)}
    assert rates == {name: 0.5 if size <= 16 else 0.0 for name, size in sizes.items()}
    assert set(sizes.values()) == {32, 16, 8}


@pytest.mark.parametrize(("sizes", "message"), [((4,), "no level has 4 px"), ((), "at least 1 item")])
def test_a_resolution_that_no_level_has_is_refused(sizes: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        small_model(dropout=0.5, dropout_resolutions=sizes)
