"""Sums of features merge exactly, and give numpy's mean and covariance."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmscale.errors import UserError
from cmscale.evaluation.blocks import BlockStore, blocks
from cmscale.evaluation.statistics import Moments, Sums, checked_moments, total

FEATURES = np.random.default_rng(0).gamma(0.5, size=(97, 12)).astype(np.float32)


@pytest.mark.parametrize("count", [2, 97])
def test_moments_are_numpys_mean_and_unbiased_covariance(count: int) -> None:
    moments = Sums.of(FEATURES[:count]).moments()
    exact = FEATURES[:count].astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False), rtol=1e-12, atol=1e-15)


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 97), max_size=6), seed=st.integers(0, 99))
def test_any_split_in_any_order_merges_to_the_same_moments(cuts: list[int], seed: int) -> None:
    edges = [0, *sorted(cuts), 97]
    parts = [Sums.of(FEATURES[a:b]) for a, b in pairwise(edges)]
    order = np.random.default_rng(seed).permutation(len(parts))
    merged = total(parts[i] for i in order).moments()
    whole = Sums.of(FEATURES).moments()
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-13)


def test_the_factor_reproduces_the_covariance_and_has_its_rank() -> None:
    few = FEATURES[:6]  # rank 5 in 12 dimensions
    moments = Sums.of(few).moments()
    assert moments.factor.shape == (12, 5)
    np.testing.assert_allclose(moments.factor @ moments.factor.T, moments.covariance, atol=1e-12)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least 2"):
        Sums.of(FEATURES[:1]).moments()
    with pytest.raises(UserError, match="0 samples"):
        total([])


def test_blocks_cover_every_sample_once() -> None:
    found = [index for block in blocks(300) for index in block]
    assert found == list(range(300))


def _features(block: range) -> dict[str, np.ndarray]:
    random = np.random.default_rng(block.start)
    return {
        "pooled": random.random((len(block), 5), dtype=np.float32),
        "logits": np.zeros((len(block), 3), "f4"),
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_number_of_ranks_does_not_change_the_sums(tmp_path, num_ranks: int) -> None:
    store = BlockStore(tmp_path, identity={"seed": 0}, num_samples=700)
    todo = store.missing()
    for rank in reversed(range(num_ranks)):
        for block in todo[rank::num_ranks]:
            store.commit(block, _features(block))
    got = total(Sums.of(features["pooled"]) for _, features in store.read())
    expected = total(Sums.of(_features(block)["pooled"]) for block in blocks(700))
    assert np.array_equal(got.second, expected.second)
    assert np.array_equal(got.first, expected.first)


def test_a_killed_evaluation_continues_with_the_missing_blocks_and_another_never_reads_them(tmp_path) -> None:
    first = BlockStore(tmp_path, identity={"seed": 0}, num_samples=300)
    first.commit(range(128, 256), _features(range(128, 256)))
    again = BlockStore(tmp_path, identity={"seed": 0}, num_samples=300)
    assert again.missing() == [range(0, 128), range(256, 300)]
    other = BlockStore(tmp_path, identity={"seed": 1}, num_samples=300)
    assert other.missing() == blocks(300)
    with pytest.raises(FileNotFoundError):
        list(again.read())
    assert again.metrics() is None
    again.finish({"fid": 1.5})
    assert again.missing() == blocks(300)  # the metrics replace them
    assert again.metrics() == {"fid": 1.5}
    assert other.metrics() is None


def test_a_block_that_is_short_or_not_finite_is_refused(tmp_path) -> None:
    store = BlockStore(tmp_path, identity={}, num_samples=10)
    with pytest.raises(ValueError, match="9 features for the 10 samples"):
        store.commit(range(10), _features(range(9)))
    broken = _features(range(10))
    broken["pooled"][3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        store.commit(range(10), broken)
    assert store.missing() == [range(10)]


def test_moments_of_a_constant_have_an_empty_factor() -> None:
    assert Moments(np.ones(3), np.zeros((3, 3))).factor.shape == (3, 0)


WIDTH = 12
SYMMETRIC = np.cov(FEATURES.astype("f8"), rowvar=False)


@pytest.mark.parametrize(
    ("covariance", "said"),
    [
        (np.triu(SYMMETRIC), "is not symmetric"),
        (SYMMETRIC + 1e-3 * np.triu(np.ones((WIDTH, WIDTH)), 1), "is not symmetric"),
        (-np.eye(WIDTH), "not positive semidefinite"),
        (SYMMETRIC - 0.1 * np.eye(WIDTH) * np.trace(SYMMETRIC), "not positive semidefinite"),
        (np.ones((WIDTH, WIDTH)) - np.eye(WIDTH), "not positive semidefinite"),  # no variance, yet correlated
        (SYMMETRIC * np.nan, "holds NaN or infinity"),
        (SYMMETRIC + np.inf, "holds NaN or infinity"),
        (SYMMETRIC[:, :5], "don't fit"),
        (SYMMETRIC[0], "don't fit"),
        (SYMMETRIC.astype("U9"), "must be real numbers"),
        (SYMMETRIC.astype("c16"), "must be real numbers"),
    ],
)
def test_a_matrix_that_is_no_covariance_is_refused(covariance: np.ndarray, said: str) -> None:
    with pytest.raises(UserError, match=f"^theirs: .*{said}"):
        checked_moments(np.zeros(WIDTH), covariance, origin="theirs")


def test_covariances_of_any_rank_and_precision_that_programs_store_are_taken() -> None:
    few = np.cov(FEATURES[:4].astype("f8"), rowvar=False)  # rank 3: eigenvalues of -1e-17
    single = np.cov(FEATURES[:4], rowvar=False, dtype=np.float32)
    for covariance in (SYMMETRIC, few, SYMMETRIC.astype("f4"), few.astype("f4"), single, few.astype("f2"), 0 * few):
        found = checked_moments(np.zeros(WIDTH), covariance, origin="theirs")
        assert np.array_equal(found.covariance, covariance.astype("f8"))


def test_features_that_are_not_finite_make_no_statistics() -> None:
    broken = FEATURES.copy()
    broken[3, 2] = np.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        Sums.of(broken).moments()
