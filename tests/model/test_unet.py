"""Tests that the network is the published one: names, shapes, size, and outputs against float64 formulas."""

import numpy as np
import pytest
import torch
from networks import VARIANTS, NumpyNetwork, random_weights, relative, small_model

from cmscale.config import Model
from cmscale.errors import UserError
from cmscale.model import build_unet
from cmscale.model.blocks import timestep_embedding

LSUN_256 = Model(
    image_size=256,
    channels=256,
    channel_multipliers=(1, 1, 2, 2, 4, 4),
    num_res_blocks=2,
    attention_resolutions=(32, 16, 8),
)
IMAGENET_64 = Model(
    image_size=64,
    channels=192,
    channel_multipliers=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    scale_shift_norm=True,
    num_classes=1000,
)


def inputs(model: Model, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, model.image_size, model.image_size, generator=source)
    c_noise = torch.tensor([1095.5, -1553.6519, 20.25])
    labels = torch.tensor([4, 0, 2]) if model.num_classes else None
    return x, c_noise, labels


def shapes_on_meta(model: Model) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_unet(model)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_formulas_in_float64(variant):
    model = small_model(variant)
    weights = random_weights(model)
    network = build_unet(model).eval()
    network.load_state_dict(weights)
    x, c_noise, labels = inputs(model)
    expected = NumpyNetwork(model, weights)(
        x.double().numpy(), c_noise.double().numpy(), None if labels is None else labels.numpy()
    )
    # the float32 rounding of c_noise = 1,500 changes the fastest sinusoid by up to 6e-5
    assert relative(network(x, c_noise, labels=labels), expected) < 1e-5


def test_lsun_256_has_526_million_parameters():
    shapes = shapes_on_meta(LSUN_256)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 526_304_771


def test_lsun_256_has_the_released_names_and_shapes():
    shapes = shapes_on_meta(LSUN_256)
    assert shapes["time_embed.0.weight"] == (1024, 256)
    assert shapes["input_blocks.0.0.weight"] == (256, 3, 3, 3)
    assert shapes["input_blocks.3.0.in_layers.2.weight"] == (256, 256, 3, 3)  # the first resampling block
    assert shapes["input_blocks.7.0.skip_connection.weight"] == (512, 256, 1, 1)
    assert shapes["input_blocks.10.1.qkv.weight"] == (1536, 512, 1, 1)  # 32 px, the first with attention
    assert "input_blocks.8.1.qkv.weight" not in shapes
    assert shapes["middle_block.1.proj_out.weight"] == (1024, 1024, 1, 1)
    assert shapes["middle_block.0.emb_layers.1.weight"] == (1024, 1024)  # no scale and shift
    assert shapes["output_blocks.0.0.in_layers.2.weight"] == (1024, 2048, 3, 3)
    assert shapes["output_blocks.2.2.in_layers.2.weight"] == (1024, 1024, 3, 3)  # upsamples from 8 px
    assert shapes["output_blocks.17.0.in_layers.2.weight"] == (256, 512, 3, 3)
    assert shapes["out.2.weight"] == (3, 256, 3, 3)
    assert "output_blocks.18.0.in_layers.2.weight" not in shapes
    assert "label_emb.weight" not in shapes


def test_imagenet_64_has_classes_and_scale_shift_norm():
    shapes = shapes_on_meta(IMAGENET_64)
    assert shapes["label_emb.weight"] == (1000, 768)
    assert shapes["middle_block.0.emb_layers.1.weight"] == (2 * 768, 768)
    assert shapes["middle_block.1.qkv.weight"] == (3 * 768, 768, 1, 1)
    assert "output_blocks.15.0.in_layers.2.weight" in shapes
    assert "output_blocks.16.0.in_layers.2.weight" not in shapes


def test_time_embedding_is_cosines_then_sines():
    found = timestep_embedding(torch.tensor([0.0, 250.0]), 8)
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    assert found[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    expected = np.concatenate([np.cos(250 * frequencies), np.sin(250 * frequencies)])
    assert np.abs(found[1].numpy() - expected).max() < 250 * 2**-23


def test_a_new_network_outputs_zero_and_its_blocks_are_their_skip_connections():
    network = build_unet(small_model())
    x, c_noise, _ = inputs(network.model)
    assert torch.equal(network(x, c_noise), torch.zeros_like(x))
    features = torch.randn(2, 64, 4, 4)
    assert torch.equal(network.middle_block[1](features), features)


def test_first_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_unet(small_model(), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (
        build_unet(small_model(), seed=3).state_dict(),
        build_unet(small_model(), seed=4).state_dict(),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["time_embed.0.weight"], other["time_embed.0.weight"])


def test_first_weights_have_the_spread_of_their_fan_in():
    weights = build_unet(small_model()).state_dict()
    for name in ("time_embed.2.weight", "input_blocks.1.0.in_layers.2.weight", "middle_block.1.qkv.weight"):
        fan_in = weights[name][0].numel()
        assert weights[name].std().item() == pytest.approx(1 / np.sqrt(3 * fan_in), rel=0.05)
        assert weights[name].abs().max().item() <= 1 / np.sqrt(fan_in)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_network_halved_as_a_whole_gives_float32_outputs_to_its_precision(dtype, bits):
    model = small_model("as ImageNet 64")
    network = build_unet(model).eval()
    network.load_state_dict(random_weights(model))
    x, c_noise, labels = inputs(model)
    with torch.no_grad():
        full = network(x, c_noise, labels=labels)
        halved = network.to(dtype)(x, c_noise, labels=labels)
    assert halved.dtype == torch.float32
    # about 50 independent roundings of 2^-bits
    assert 0 < (halved - full).std() / full.std() < 7 * 2.0**-bits


def test_labels_must_be_given_where_and_only_where_there_are_classes():
    with_classes, without = small_model("as ImageNet 64"), small_model()
    x, c_noise, labels = inputs(with_classes)
    with pytest.raises(UserError, match="needs class labels"):
        build_unet(with_classes)(x, c_noise)
    with pytest.raises(UserError, match="num_classes is not set"):
        build_unet(without)(x, c_noise, labels=labels)


@pytest.mark.slow
def test_the_whole_lsun_256_network_makes_a_forward_pass_at_256_px():
    network = build_unet(LSUN_256).eval()
    with torch.inference_mode():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        output = network(torch.randn(1, 3, 256, 256), torch.tensor([1095.5]))
    assert output.shape == (1, 3, 256, 256)
    assert torch.isfinite(output).all()
    assert output.std() > 0.01
