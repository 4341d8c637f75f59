"""DINOv2 equals transformers' implementation on the same random weights, and needs only a local file."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from cmscale.errors import UserError
from cmscale.evaluation.features.dinov2 import DINOv2
from cmscale.evaluation.features.extractor import build_features
from cmscale.evaluation.measure import image_blocks, left_out, measure
from cmscale.evaluation.reference.reference import reference_from_images
from cmscale.evaluation.reference.registry import read_reference

WIDTH, DEPTH, SIDE = 128, 2, 37
IMAGES = np.random.default_rng(0).integers(0, 256, size=(9, 24, 24, 3), dtype=np.uint8)


def random_network(*, swiglu: bool = False) -> DINOv2:
    network = DINOv2(width=WIDTH, depth=DEPTH, patch=14, side=SIDE, swiglu=swiglu)
    source = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        value.normal_(0, 0.7 / WIDTH**0.5 if value.dim() > 1 else 0.3, generator=source)
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
            value += 1
    return network.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    torch.save(random_network().state_dict(), path)
    return path


def theirs(network: DINOv2, *, swiglu: bool) -> Dinov2Model:
    """transformers' network with the same weights, under its own names."""
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=WIDTH // 64,
        image_size=14 * SIDE,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    model = Dinov2Model(config).eval()
    mine, renamed = network.state_dict(), {}
    fixed = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    parts = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    for name in model.state_dict():
        ours = fixed.get(name, name.replace("encoder.layer", "blocks"))
        ours = ours.replace("layer_scale1.lambda1", "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
        ours = (
            ours.replace("attention.output.dense", "attn.proj")
            .replace("weights_in", "w12")
            .replace("weights_out", "w3")
        )
        for number, part in enumerate(parts):
            if part in ours:
                whole = mine[ours.replace(part, "attn.qkv")]
                renamed[name] = whole.chunk(3)[number]
                break
        else:
            renamed[name] = mine[ours]
    model.load_state_dict(renamed)
    return model


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
def test_class_token_equals_transformers_with_and_without_resized_positions(swiglu: bool) -> None:
    network = random_network(swiglu=swiglu)
    other = theirs(network, swiglu=swiglu)
    for size in (14 * SIDE, 70):
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.inference_mode():
            if size != 14 * SIDE:  # transformers resizes positions to the size, the published code by the scale
                side = size // 14
                other.embeddings.position_embeddings = torch.nn.Parameter(network._positions(side, side))
            expected = other(x).last_hidden_state[:, 0]
            found = network.class_token(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_positions_are_resized_by_the_published_scale() -> None:
    network = random_network()
    rows = torch.arange(SIDE, dtype=torch.float32).view(SIDE, 1, 1).expand(SIDE, SIDE, WIDTH)
    network.pos_embed.data[:, 1:] = rows.reshape(1, -1, WIDTH)
    found = network._positions(16, 16)[0, 1:].view(16, 16, WIDTH)
    # At scale (16 + 0.1) / 37 the middle of new row i lies at (i + 0.5) 37 / 16.1 - 0.5 of the old rows, and torch's
    # cubic kernel has a = -0.75.
    at = (np.arange(1, 15) + 0.5) * 37 / 16.1 - 0.5
    low = np.floor(at)
    expected = sum(_cubic(at - low - tap) * (low + tap) for tap in (-1, 0, 1, 2))
    np.testing.assert_allclose(found[1:15, 3, 0].detach(), expected, rtol=1e-4)


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def test_features_come_from_a_local_file_and_the_distance_is_called_fd_dinov2(weights: Path) -> None:
    extractor = build_features("dinov2", weights=weights)
    assert (extractor.label, extractor.width, extractor.spatial_width) == ("dinov2_128x2", 128, None)
    reference = reference_from_images(IMAGES, extractor, name="images", count=len(IMAGES))
    found = measure(image_blocks(IMAGES, extractor), num_samples=len(IMAGES), reference=reference)
    assert found["fid"] < 1e-6 * np.trace(reference.pooled.covariance)
    assert "inception_score" not in found
    assert any("no IS " in line for line in left_out(found, reference=reference))
    assert extractor.distance_name == "FD-DINOv2"


def test_published_sizes_are_named() -> None:
    for (width, depth), name in {(384, 12): "vits14", (1536, 40): "vitg14"}.items():
        with torch.device("meta"):
            network = DINOv2(width=width, depth=depth, patch=14, side=37, swiglu=name == "vitg14")
            assert DINOv2.for_weights(network.state_dict()).label == f"dinov2_{name}"
    assert sum(value.numel() for value in network.state_dict().values()) == pytest.approx(1.1365e9, rel=1e-4)


def test_missing_and_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set evaluate\.features_weights"):
        build_features("dinov2")
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "register_tokens": torch.zeros(1, 4, WIDTH)}, tmp_path / "registers.pth")
    with pytest.raises(UserError, match="not the weights of dinov2"):
        build_features("dinov2", weights=tmp_path / "registers.pth")
    with pytest.raises(UserError, match="not the weights of efficientnet"):
        build_features("efficientnet", weights=weights)


def test_edm2s_file_is_read_only_for_the_variant_that_it_holds(weights: Path, tmp_path: Path) -> None:
    content = {"num_images": 9, "fid": {}, "fd_dinov2": {"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH)}}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(content))
    extractor = build_features("dinov2", weights=weights)
    with pytest.raises(UserError, match="dinov2_vitl14 statistics, the evaluation uses dinov2_128x2"):
        read_reference(tmp_path / "edm2.pkl", extractor)
    extractor.network.label = "dinov2_vitl14"
    found = read_reference(tmp_path / "edm2.pkl", extractor)
    assert (found.count, found.pooled.width) == (9, WIDTH)
