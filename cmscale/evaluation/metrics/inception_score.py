"""The Inception Score: how certain and how diverse a classifier's predictions for the samples are."""

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import DistributionMetric, Need, ReferenceSet, SampleSet

TORCH_FIDELITY_SEED = 2020  # torch-fidelity's `rng_seed`, which shuffles the samples

_ROWS = 128  # logits converted to float64 at a time; another number changes the order of summation, so the last bits


def inception_score(
    logits: np.ndarray, *, splits: int = 10, shuffle_seed: int | None = TORCH_FIDELITY_SEED
) -> tuple[float, float]:
    """Mean and deviation over `splits` parts of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    The mean KL of a part is mean(sum p ln p) - sum q ln q with q the mean of p, so no probabilities are kept. Samples
    are dealt to the parts by a shuffle of their indices, as in torch-fidelity (`shuffle_seed`), or in order, as in
    ADM's evaluator (None; its parts of 5,000 are ten for 50,000 samples). Parts without samples do not count.

    Args:
        logits: [N, classes].

    Raises:
        UserError: No samples.
    """
    count, classes = logits.shape
    if count == 0:
        raise UserError("Inception Score: no samples")
    part_of = _parts(count, splits, shuffle_seed)
    counts, entropies, probabilities = np.zeros(splits), np.zeros(splits), np.zeros((splits, classes))
    for at in range(0, count, _ROWS):
        exact = logits[at : at + _ROWS].astype(np.float64)
        exact -= exact.max(axis=1, keepdims=True)
        log_p = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        parts = part_of[at : at + _ROWS]
        for part in np.unique(parts):
            rows = parts == part
            counts[part] += rows.sum()
            entropies[part] += (p[rows] * log_p[rows]).sum()
            probabilities[part] += p[rows].sum(axis=0)
    filled = counts > 0
    q = probabilities[filled] / counts[filled, None]
    q_entropy = np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0)), 0.0).sum(axis=1)
    scores = np.exp(entropies[filled] / counts[filled] - q_entropy)
    return float(scores.mean()), float(scores.std())


def _parts(count: int, splits: int, shuffle_seed: int | None) -> np.ndarray:
    """The part of each sample, int64 [count]."""
    order = np.arange(count) if shuffle_seed is None else np.random.RandomState(shuffle_seed).permutation(count)
    parts = np.empty(count, dtype=np.int64)
    for part in range(splits):
        parts[order[part * count // splits : (part + 1) * count // splits]] = part
    return parts


def _score(samples: SampleSet, reference: ReferenceSet) -> tuple[float, float]:
    del reference  # the score compares the samples with each other alone
    assert samples.logits is not None
    return inception_score(samples.logits)


METRICS = (
    DistributionMetric(
        name="inception_score",
        title="Inception Score",
        format=".2f",
        higher_is_better=True,
        spread_name="inception_score_split_std",
        needs=frozenset({Need.CLASS_LOGITS}),
        compute=_score,
    ),
)
