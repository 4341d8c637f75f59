"""Precision, recall, density and coverage equal their definitions and torch-fidelity, with blocks of any size."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from cmscale.evaluation import manifold
from cmscale.evaluation.manifold import DENSITY_K, K, Manifold, Neighbourhood, compare


def _features(count: int, *, seed: int, width: int = 24, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).gamma(0.7, size=(count, width)) + shift).astype(np.float32)


_X, _Y = _features(150, seed=1, shift=0.1), _features(120, seed=2)
PAIRS = {
    "distinct": (_X, _Y),
    "far from the origin": (_X + 100, _Y + 100),
    "samples that copy the reference": (np.concatenate([_X[:50], _Y[:70]]), _Y),
    "every sample seven times": (np.repeat(_X[:20], 7, axis=0), _Y),
    "a collapsed model": (np.repeat(_Y[:1], 60, axis=0), _Y),
    "near duplicates far from the centre": (
        np.repeat(_X[:6], 30, axis=0) * 1000 + _features(180, seed=3),
        np.repeat(_X[:6], 30, axis=0) * 1000 + _features(180, seed=4),
    ),
    "both sides duplicated": (np.repeat(_Y[:9], 6, axis=0), np.repeat(_Y, 6, axis=0)),
}


def _defined(x: np.ndarray, y: np.ndarray) -> Neighbourhood:
    """The papers' definitions (and the code released with Naeem et al.), with exact float64 distances."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a.astype("f8")[:, None] - b.astype("f8")[None]) ** 2).sum(axis=2)

    def radii(a: np.ndarray, k: int) -> np.ndarray:
        return np.sort(distances(a, a), axis=1)[:, k]

    d = distances(x, y)
    dense = d < radii(y, DENSITY_K)[None]
    return Neighbourhood(
        precision=(d <= radii(y, K)[None]).any(axis=1).mean(),
        recall=(d <= radii(x, K)[:, None]).any(axis=0).mean(),
        density=dense.sum() / (DENSITY_K * len(x)),
        coverage=dense.any(axis=0).mean(),
    )


@pytest.mark.parametrize("block_elements", [1 << 24, 700])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_definitions_whatever_the_block(name: str, block_elements: int, monkeypatch) -> None:
    monkeypatch.setattr(manifold, "_BLOCK_ELEMENTS", block_elements)
    x, y = PAIRS[name]
    assert compare(Manifold(x), Manifold(y)) == _defined(x, y)


@pytest.mark.parametrize("name", ["distinct", "samples that copy the reference"])
def test_equals_torch_fidelitys(name: str) -> None:
    x, y = PAIRS[name]
    theirs = prc_features_to_metric(
        torch.from_numpy(x).double(),
        torch.from_numpy(y).double(),
        prc_neighborhood=3,
        prc_batch_size=64,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = compare(Manifold(x), Manifold(y))
    assert ours.precision == pytest.approx(theirs["precision"], rel=1e-6)  # theirs are means of float32
    assert ours.recall == pytest.approx(theirs["recall"], rel=1e-6)


def test_a_set_compared_with_itself_is_perfect() -> None:
    found = compare(Manifold(_Y), Manifold(_Y.copy()))
    assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)


def test_no_block_of_distances_exceeds_its_limit(monkeypatch) -> None:
    monkeypatch.setattr(manifold, "_BLOCK_ELEMENTS", 1000)
    seen = []
    inner = manifold._squared_distances
    monkeypatch.setattr(manifold, "_squared_distances", lambda *args: seen.append(inner(*args)) or seen[-1])
    compare(Manifold(_X), Manifold(_Y))
    assert len(seen) > 10
    assert max(block.numel() for block in seen) <= 1000


def test_too_few_features_for_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        Manifold(_X[:5])
