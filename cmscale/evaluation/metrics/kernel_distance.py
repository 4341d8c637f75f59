"""KID: the kernel distance (maximum mean discrepancy) between features of samples and reference."""

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import DistributionMetric, Need, ReferenceSet, SampleSet, SetSizes

TORCH_FIDELITY_SEED = 2020  # torch-fidelity's `rng_seed`, which draws the subsets
SUBSETS, SUBSET_SIZE = 100, 1000  # torch-fidelity's

_KERNEL_ELEMENTS = 1 << 25  # a kernel of at most 256 MiB is computed once for all subsets


def kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = TORCH_FIDELITY_SEED,
) -> tuple[float, float]:
    """Mean and deviation over subsets of the unbiased MMD^2 (Binkowski et al. 2018, section 4).

    The kernel is k(x, y) = (x.y / D + 1)^3. Subsets and seed are torch-fidelity's. A side with fewer than `subset_size`
    samples makes all subsets that small (torch-fidelity raises an error).

    Args:
        samples, reference: Features [N, D] and [M, D].

    Raises:
        UserError: Fewer than two samples on a side.
    """
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise UserError(f"KID: {size} sample(s); it needs at least 2")
    random = np.random.RandomState(seed)
    n, m = len(samples), len(reference)
    whole = None
    if n * n + n * m + m * m <= _KERNEL_ELEMENTS:
        whole = _kernel(samples, samples), _kernel(samples, reference), _kernel(reference, reference)
    values = np.empty(subsets)
    for number in range(subsets):
        i, j = random.choice(n, size, replace=False), random.choice(m, size, replace=False)
        if whole is not None:
            xx, xy, yy = whole[0][np.ix_(i, i)], whole[1][np.ix_(i, j)], whole[2][np.ix_(j, j)]
        else:
            x, y = samples[i], reference[j]
            xx, xy, yy = _kernel(x, x), _kernel(x, y), _kernel(y, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        values[number] = within / (size * (size - 1)) - 2 * xy.sum() / (size * size)
    return float(values.mean()), float(values.std())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) of every pair, float64 [len(x), len(y)]."""
    base = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
    return base * base * base  # numpy takes six times as long for `** 3`


def _kid(samples: SampleSet, reference: ReferenceSet) -> tuple[float, float]:
    assert reference.subset is not None
    return kernel_distance(samples.pooled, reference.subset)


def _whole_sets(sizes: SetSizes) -> str | None:
    sides = {"samples": sizes.samples, "reference images": sizes.subset}
    whole = [f"all {count:,} {side}" for side, count in sides.items() if count <= min(SUBSET_SIZE, *sides.values())]
    if not whole:
        return None
    return f"every subset of KID holds {' and '.join(whole)}, so kid_subset_std does not show how much KID varies"


METRICS = (
    DistributionMetric(
        name="kid",
        title="KID",
        format="#.4g",
        higher_is_better=False,
        spread_name="kid_subset_std",
        needs=frozenset({Need.REFERENCE_IMAGES}),
        settings=lambda sizes: {
            "subsets": SUBSETS,
            "subset_size": min(SUBSET_SIZE, sizes.samples, sizes.subset),
            "seed": TORCH_FIDELITY_SEED,
        },
        caveat=_whole_sets,
        compute=_kid,
    ),
)
