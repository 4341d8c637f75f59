"""Inception features equal torch-fidelity's; EfficientNet-Lite0 classifies photographs; a new network is one file."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import cmscale.evaluation.features
from cmscale.config import Evaluate
from cmscale.errors import UserError
from cmscale.evaluation.features.extractor import build_features
from cmscale.evaluation.features.inception import FIDInception
from cmscale.runs.manifests import read_document
from cmscale.runs.results import EvaluationResult


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random Inception weights that preserve the variance of activations (torch's initialisation lets it vanish)."""
    with torch.device("meta"):
        network = FIDInception()
    network.to_empty(device="cpu")
    source = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        value.fill_(float(name.endswith(("bn.weight", "running_var"))))
        if value.dim() >= 2:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=source)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.1, generator=source)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


IMAGES = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured(weights) -> dict[str, np.ndarray]:
    return build_features("inception", weights=weights)(IMAGES)


@pytest.fixture(scope="module")
def theirs(weights) -> dict[str, np.ndarray]:
    """torch-fidelity's extractor with the same weights and images, and the layer that ADM's evaluator reads."""
    extractor = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )
    tapped: list[torch.Tensor] = []
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda *call: tapped.append(call[2]))
    pooled, logits = extractor(IMAGES)
    nhwc = tapped[0].permute(0, 2, 3, 1)[..., :7]
    return {
        "pooled": pooled.numpy(),
        "logits": logits.numpy(),
        "spatial": nhwc.reshape(len(IMAGES), -1).numpy(),
    }


@pytest.mark.parametrize(("name", "width"), [("pooled", 2048), ("logits", 1008), ("spatial", 2023)])
@pytest.mark.long
def test_inception_equals_torch_fidelitys(measured, theirs, name: str, width: int) -> None:
    assert measured[name].shape == (6, width)
    assert measured[name].dtype == np.float32
    scale = np.abs(theirs[name]).max()
    assert scale > 0.1
    np.testing.assert_allclose(measured[name], theirs[name], atol=2e-5 * scale)


def test_features_of_an_image_differ_between_images_and_not_between_calls(measured, weights) -> None:
    again = build_features("inception", weights=weights)(IMAGES)
    assert np.array_equal(again["pooled"], measured["pooled"])
    assert np.ptp(measured["pooled"], axis=0).max() > 0.1


def test_weights_are_checked_against_their_hash(weights, tmp_path) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert build_features("inception", weights=weights, sha256=digest).weights_sha256 == digest
    with pytest.raises(UserError, match="its SHA-256 is"):
        build_features("inception", weights=weights, sha256="0" * 64)
    named = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    named.symlink_to(weights)
    with pytest.raises(UserError, match="expected 6726825d"):
        build_features("inception", weights=named)


def test_other_weights_unknown_networks_and_missing_files_are_refused(weights, tmp_path) -> None:
    with pytest.raises(UserError, match="not the weights of efficientnet"):
        build_features("efficientnet", weights=weights)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="not the weights of inception"):
        build_features("inception", weights=tmp_path / "text.pth")
    with pytest.raises(UserError, match="no such weights file"):
        build_features("inception", weights=tmp_path / "absent.pth")
    with pytest.raises(UserError, match="got 'resnet'; allowed: dinov2, efficientnet, inception"):
        build_features("resnet")


def test_only_uint8_images_are_measured() -> None:
    extractor = build_features("efficientnet")
    with pytest.raises(ValueError, match="uint8"):
        extractor(IMAGES.float())
    with pytest.raises(ValueError, match="uint8"):
        extractor(IMAGES[:, :1])


@pytest.mark.parametrize(("photograph", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {967, 504, 968})])
def test_efficientnet_classifies_photographs(photograph: str, classes: set[int]) -> None:
    data = pytest.importorskip("skimage.data")
    image = getattr(data, photograph)()
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
    extractor = build_features("efficientnet")
    features = extractor(square)
    assert extractor.label == "efficientnet_lite0"
    assert features["pooled"].shape == (1, 1280)
    assert set(features) == {"pooled", "logits"}
    assert int(features["logits"].argmax()) in classes  # ImageNet's cats; espresso, mug, cup


TOY = """
import torch

from cmscale.errors import UserError
from cmscale.evaluation.features.extractor import FeatureNetwork


class MeanColour(FeatureNetwork):
    label = "mean_colour"
    distance_name = "FD-Colour"
    width = 3

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))

    @classmethod
    def default_weights(cls):
        raise UserError("features colour: set evaluate.features_weights")

    def forward(self, images):
        return {"pooled": self.gain * images.float().mean(dim=(2, 3))}


NETWORK = MeanColour
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The weights of a feature network that one new file, `colour.py`, adds to the package."""
    package = cmscale.evaluation.features
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "colour.py").write_text(TOY)
    (tmp_path / "networks" / "empty.py").write_text("")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "networks")])
    path = tmp_path / "colour.pth"
    torch.save({"gain": torch.tensor([1.0, 2.0, 3.0])}, path)
    yield path
    for name in ("colour", "empty"):
        if sys.modules.pop(f"{package.__name__}.{name}", None):
            delattr(package, name)


def test_a_network_in_a_new_file_is_found_by_its_name(toy: Path) -> None:
    extractor = build_features("colour", weights=toy)
    assert (extractor.label, extractor.distance_name, extractor.width) == ("mean_colour", "FD-Colour", 3)
    expected = IMAGES.float().mean(dim=(2, 3)).numpy() * [1, 2, 3]
    np.testing.assert_allclose(extractor(IMAGES)["pooled"], expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"set evaluate\.features_weights"):
        build_features("colour")
    with pytest.raises(TypeError, match=r"empty\.py: defines no NETWORK"):
        build_features("empty")


def test_a_network_in_a_new_file_is_known_to_the_config_and_the_command(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    assert Evaluate(features="colour", features_weights=str(toy)).weights() == ("features_weights", str(toy))
    out = tmp_path / "out.json"
    arguments = ["--features", "colour", "--features-weights", toy, "--reference", tmp_path / "images"]
    assert run(monkeypatch, "evaluate", tmp_path / "images", *arguments, "--out", out, "--device", "cpu") == 0
    found = read_document(EvaluationResult, out.read_bytes(), origin="out")
    assert (found.features, found.score_name) == ("mean_colour", "FD-Colour")
    assert any("no IS " in line for line in found.warnings)
    assert any("no sFID" in line for line in found.warnings)
