"""FID and sFID: the Fréchet distance between Gaussians that are fitted to features of samples and reference."""

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import DistributionMetric, Need, ReferenceSet, SampleSet, SetSizes
from cmscale.evaluation.statistics import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """||m_a - m_b||^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, equation 6).

    With C = L L^T the trace of the root is the nuclear norm of L_a^T L_b. Singular values carry an error of machine
    precision, whereas square roots of the eigenvalues of C_a C_b would carry its root; degenerate covariances (fewer
    samples than dimensions) need no regularisation. `Moments` caches its factor, so a reference's is computed once.

    Raises:
        UserError: The widths differ, or the values are so large that the distance overflows.
    """
    if a.width != b.width:
        raise UserError(f"features of width {a.width} cannot be compared with a reference of width {b.width}")
    shift = a.mean - b.mean
    cross = 0.0
    if a.factor.size and b.factor.size:
        cross = float(np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum())
    with np.errstate(over="ignore", invalid="ignore"):
        distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    if not np.isfinite(distance):
        raise UserError("Fréchet distance: it overflows; a mean or a covariance holds values that no features have")
    return float(max(distance, 0.0))


def _fid(samples: SampleSet, reference: ReferenceSet) -> float:
    return frechet_distance(samples.moments, reference.pooled)


def _sfid(samples: SampleSet, reference: ReferenceSet) -> float:
    assert samples.spatial is not None
    assert reference.spatial is not None
    return frechet_distance(samples.spatial, reference.spatial)


def _few(sizes: SetSizes) -> str | None:
    counts = {"samples": sizes.samples, "reference images": sizes.reference}
    few = [f"{count:,} {side}" for side, count in counts.items() if count is not None and count <= sizes.width]
    if not few:
        return None
    return (
        f"{' and '.join(few)} for {sizes.width:,} feature dimensions: their covariance is singular, so the Fréchet "
        "distance says little about the distributions; use more than there are dimensions"
    )


FID = DistributionMetric(
    name="fid", title="Fréchet distance", format=".2f", higher_is_better=False, caveat=_few, compute=_fid
)
"""The score that results are compared by. Each result has its own title for it, `EvaluationResult.score_name`."""

METRICS = (
    FID,
    DistributionMetric(
        name="sfid",
        title="sFID",
        format=".2f",
        higher_is_better=False,
        needs=frozenset({Need.SPATIAL_FEATURES}),
        compute=_sfid,
    ),
)
