"""The Inception Score: how certain and how diverse a classifier's predictions for the samples are.

It is the mean over parts of the samples, and depends on their size. Two published conventions are measured side by
side: torch-fidelity's ten parts of shuffled samples, and ADM's parts of 5,000 samples in order.
"""

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import DistributionMetric, Need, ReferenceSet, SampleSet, SetSizes

TORCH_FIDELITY_SEED = 2020  # torch-fidelity's `rng_seed`, which shuffles the samples
TORCH_FIDELITY_SPLITS = 10
ADM_SPLIT_SIZE = 5000

_ROWS = 128  # logits converted to float64 at a time; another number changes the order of summation, so the last bits


def inception_score(
    logits: np.ndarray, *, splits: int = TORCH_FIDELITY_SPLITS, shuffle_seed: int | None = TORCH_FIDELITY_SEED
) -> tuple[float, float]:
    """Mean and deviation over `splits` parts of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    Samples are dealt to the parts by a shuffle of their indices, as in torch-fidelity (`shuffle_seed`), or in order
    (None). Parts without samples do not count.

    Args:
        logits: [N, classes].

    Raises:
        UserError: No samples.
    """
    return _over_parts(logits, _parts(len(logits), splits, shuffle_seed))


def adm_inception_score(logits: np.ndarray, *, split_size: int = ADM_SPLIT_SIZE) -> float:
    """The mean over parts of `split_size` samples in order, as in ADM's evaluator; the last part may be smaller.

    Args:
        logits: [N, classes].

    Raises:
        UserError: No samples.
    """
    return _over_parts(logits, np.arange(len(logits)) // split_size)[0]


def _over_parts(logits: np.ndarray, part_of: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of the parts' scores; `part_of` is the part of each sample, int64 [N].

    The mean KL of a part is mean(sum p ln p) - sum q ln q with q the mean of p, so no probabilities are kept.
    """
    count, classes = logits.shape
    if count == 0:
        raise UserError("Inception Score: no samples")
    splits = int(part_of.max()) + 1
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


def _torch_fidelitys(samples: SampleSet, reference: ReferenceSet) -> tuple[float, float]:
    del reference  # the score compares the samples with each other alone
    assert samples.logits is not None
    return inception_score(samples.logits)


def _adms(samples: SampleSet, reference: ReferenceSet) -> float:
    del reference
    assert samples.logits is not None
    return adm_inception_score(samples.logits)


def _few(sizes: SetSizes) -> str | None:
    if sizes.samples >= ADM_SPLIT_SIZE:
        return None
    return f"IS (ADM) takes parts of {ADM_SPLIT_SIZE:,} samples; all {sizes.samples:,} are one smaller part"


METRICS = (
    DistributionMetric(
        name="inception_score",
        title="IS (torch-fidelity)",
        stem="IS",
        format=".2f",
        higher_is_better=True,
        spread_name="inception_score_split_std",
        needs=frozenset({Need.CLASS_LOGITS}),
        settings=lambda sizes: {
            "splits": min(TORCH_FIDELITY_SPLITS, sizes.samples),
            "shuffle_seed": TORCH_FIDELITY_SEED,
        },
        compute=_torch_fidelitys,
    ),
    DistributionMetric(
        name="inception_score_adm",
        title="IS (ADM)",
        stem="IS",
        format=".2f",
        higher_is_better=True,
        needs=frozenset({Need.CLASS_LOGITS}),
        settings=lambda sizes: {
            "splits": -(-sizes.samples // ADM_SPLIT_SIZE),
            "split_size": ADM_SPLIT_SIZE,
        },
        caveat=_few,
        compute=_adms,
    ),
)
