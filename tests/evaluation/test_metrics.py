"""FID, KID and Inception Score equal torch-fidelity's own code and ADM's definitions on the same features."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from cmscale.errors import UserError
from cmscale.evaluation.metrics import kernel_distance as kid
from cmscale.evaluation.metrics.frechet import frechet_distance
from cmscale.evaluation.metrics.inception_score import inception_score
from cmscale.evaluation.metrics.kernel_distance import kernel_distance
from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.evaluation.statistics import Moments, Sums
from cmscale.runs.results import Metric


def _features(count: int, width: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Non-negative and correlated, as pooled features are."""
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    raw = np.random.default_rng(seed).normal(size=(count, width)) @ mixing
    return np.maximum(raw * scale + shift, 0).astype(np.float32)


PAIRS = {
    "more samples than dimensions": (
        _features(500, 48, seed=1),
        _features(600, 48, seed=2, scale=1.2, shift=0.1),
    ),
    "fewer samples than dimensions": (_features(40, 160, seed=1), _features(50, 160, seed=2, shift=0.1)),
    "one side degenerate": (_features(30, 64, seed=1), _features(400, 64, seed=2, shift=0.1)),
    "duplicated samples": (
        np.repeat(_features(60, 48, seed=1), 5, axis=0),
        _features(300, 48, seed=2, shift=0.1),
    ),
    "a constant dimension": (
        _features(200, 32, seed=1) * np.r_[0, np.ones(31)].astype("f4"),
        _features(200, 32, seed=2, shift=0.1),
    ),
}


@pytest.fixture(params=PAIRS, ids=str)
def pair(request) -> tuple[np.ndarray, np.ndarray]:
    return PAIRS[request.param]


def _fid(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(Sums.of(x).moments(), Sums.of(y).moments())


def test_fid_equals_torch_fidelitys(pair) -> None:
    statistics = [fid_features_to_statistics(torch.from_numpy(part).double()) for part in pair]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert _fid(*pair) == pytest.approx(theirs, rel=1e-6)  # 1e-6: the roots of torch-fidelity's eigenvalues near 0


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")  # degenerate on purpose
def test_fid_equals_adms_definition(pair) -> None:
    (m, a), (n, b) = ((part.astype("f8").mean(axis=0), np.cov(part.astype("f8"), rowvar=False)) for part in pair)
    root = scipy.linalg.sqrtm(a @ b)
    if not np.isfinite(root).all():
        offset = np.eye(len(a)) * 1e-6
        root = scipy.linalg.sqrtm((a + offset) @ (b + offset))
    theirs = ((m - n) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root.real)
    assert _fid(*pair) == pytest.approx(theirs, rel=1e-4)


def test_fid_of_gaussians_that_commute_is_the_closed_form() -> None:
    a = Moments(np.array([1.0, 0.0]), np.diag([4.0, 9.0]))
    b = Moments(np.array([0.0, 2.0]), np.diag([1.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-14)


def test_fid_of_a_set_with_itself_is_zero_to_machine_precision() -> None:
    x = _features(40, 160, seed=1)
    assert _fid(x, x) <= 1e-12 * np.trace(Sums.of(x).moments().covariance)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="width 8 cannot be compared with a reference of width 9"):
        _fid(_features(20, 8, seed=1), _features(20, 9, seed=1))


@pytest.mark.parametrize("kernel_elements", [0, 1 << 25], ids=["a kernel per subset", "one kernel"])
def test_kid_equals_torch_fidelitys_mean_and_deviation(pair, kernel_elements: int, monkeypatch) -> None:
    monkeypatch.setattr(kid, "_KERNEL_ELEMENTS", kernel_elements)
    size = min(25, *map(len, pair))
    mean, deviation = kernel_distance(*pair, subset_size=size)
    theirs = kid_features_to_metric(
        *(torch.from_numpy(part).double() for part in pair),
        kid_subsets=100,
        kid_subset_size=size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=2020,
        verbose=False,
    )
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kid_of_one_sample_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(np.ones((1, 4), "f4"), np.ones((9, 4), "f4"))


LOGITS = np.random.default_rng(5).normal(size=(234, 20)).astype(np.float32) * 3


def test_inception_score_equals_torch_fidelitys() -> None:
    mean, deviation = inception_score(LOGITS)
    theirs = isc_features_to_metric(torch.from_numpy(LOGITS), splits=10, shuffle=True, rng_seed=2020)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_in_order_equals_adms_definition() -> None:
    logits = LOGITS[:230].astype("f8")
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for i in range(0, 230, 23):  # ADM: parts of a fixed size, in their order
        part = p[i : i + 23]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    assert inception_score(LOGITS[:230], shuffle_seed=None)[0] == pytest.approx(np.mean(scores), rel=1e-12)


def test_inception_score_of_certain_predictions_is_the_number_of_classes_in_a_part() -> None:
    logits = np.eye(4, dtype="f4")[np.arange(400) % 4] * 1e4  # the other classes' probabilities underflow to 0
    assert inception_score(logits, shuffle_seed=None) == pytest.approx((4.0, 0.0), rel=1e-12)
    assert inception_score(np.zeros((400, 4), "f4")) == pytest.approx((1.0, 0.0), rel=1e-12)


def test_inception_score_of_few_samples_counts_only_the_parts_that_hold_some() -> None:
    assert inception_score(np.eye(4, dtype="f4") * 1e4) == (1.0, 0.0)  # one sample per part
    with pytest.raises(UserError, match="no samples"):
        inception_score(np.zeros((0, 4), "f4"))


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("kid", (0.0012, 0.0012), ("0.001200", "± 0.000000")),
        ("kid", (0.0012, 0.0014), ("0.001300", "± 0.000141")),
        ("kid", (1.2e-6, 1.4e-6), ("1.300e-06", "± 1.414e-07")),
        ("kid", (1.5, 2.5), ("2.000", "± 0.707")),
        ("fid", (3.0, 3.0), ("3.00", "± 0.00")),
        ("fid", (3.0,), ("3.00", "")),
    ],
)
def test_a_deviation_has_the_decimals_of_its_mean(name: str, values: tuple[float, ...], shown: tuple[str, str]) -> None:
    metric = next(each for each in all_metrics() if each.name == name)
    assert metric.formatted(Metric.of(values)) == shown
