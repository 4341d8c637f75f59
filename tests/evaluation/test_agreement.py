"""From images to metrics: the values equal those of torch-fidelity's code on the same images and weights.

Both sides have fewer samples than dimensions, so every covariance is degenerate, and hold some images twice.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from cmscale.evaluation.features.extractor import build_features
from cmscale.evaluation.features.inception import FIDInception
from cmscale.evaluation.measure import image_blocks, measure
from cmscale.evaluation.metrics.kernel_distance import kernel_distance
from cmscale.evaluation.reference.reference import reference_from_images

KID = {"kid_subsets": 100, "kid_subset_size": 9}
THEIRS = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


def blurred_noise(count: int, *, seed: int, contrast: float) -> np.ndarray:
    """Blurred noise, uint8 [count, 32, 32, 3]; the last two are the first two again."""
    coarse = np.random.default_rng(seed).normal(128, contrast, size=(count, 4, 4, 3))
    found = coarse.clip(0, 255).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    found[-2:] = found[:2]
    return found


SAMPLES = np.concatenate([blurred_noise(8, seed=0, contrast=15), blurred_noise(9, seed=2, contrast=60)])
REAL = blurred_noise(12, seed=1, contrast=60)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that keep the activations' variance; torch's default lets the features and every FID vanish."""
    with torch.device("meta"):
        network = FIDInception()
    network.to_empty(device="cpu")
    source = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        value.fill_(float(name.endswith(("bn.weight", "running_var"))))
        if value.dim() >= 2:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=source)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


class ImageList(torch.utils.data.Dataset):
    """Images in the form that torch-fidelity reads."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = as_tensors(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def as_tensors(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def ours(kind: str, weights: Path | None) -> dict[str, float]:
    extractor = build_features(kind, weights=weights)
    reference = reference_from_images(REAL, extractor, name="real", count=len(REAL))
    found = measure(image_blocks(SAMPLES, extractor), num_samples=len(SAMPLES), reference=reference)
    assert reference.subset is not None
    features = extractor(as_tensors(SAMPLES))["pooled"], reference.subset
    found["kid"] = kernel_distance(*features, subset_size=KID["kid_subset_size"])[0]
    return found


@pytest.mark.slow
def test_inception_metrics_equal_torch_fidelitys_program(weights: Path) -> None:
    theirs = calculate_metrics(
        input1=ImageList(SAMPLES),
        input2=ImageList(REAL),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        batch_size=10,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        **KID,
    )
    found = ours("inception", weights)
    assert found["fid"] > 0.1
    excess = theirs["inception_score_mean"] - 1  # uncertain predictions of random weights
    assert found["inception_score"] - 1 == pytest.approx(excess, rel=1e-4)
    assert excess > 1e-4
    assert 0 < found["precision"] < 1
    assert found["recall"] > 0
    for name, their_name in THEIRS.items():
        assert found[name] == pytest.approx(theirs[their_name], rel=1e-4), name


@pytest.mark.long
def test_efficientnet_metrics_equal_torch_fidelitys_functions_on_its_features() -> None:
    extractor = build_features("efficientnet")
    features = [extractor(as_tensors(images)) for images in (SAMPLES, REAL)]
    pooled = [torch.from_numpy(each["pooled"]).double() for each in features]
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    theirs = {
        **fid_statistics_to_metric(*[fid_features_to_statistics(each) for each in pooled], verbose=False),
        **isc_features_to_metric(torch.from_numpy(features[0]["logits"]), splits=10, shuffle=True, rng_seed=2020),
        **kid_features_to_metric(*pooled, **KID, **kernel, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False),
        **prc_features_to_metric(*pooled, prc_neighborhood=3, prc_batch_size=9, save_cpu_ram=True, verbose=False),
    }
    found = ours("efficientnet", None)
    for name, their_name in THEIRS.items():
        assert found[name] == pytest.approx(theirs[their_name], rel=1e-4), name
