"""FID and sFID: the Fréchet distance between Gaussians that are fitted to features of samples and reference."""

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import DistributionMetric, Need, ReferenceSet, SampleSet
from cmscale.evaluation.statistics import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """||m_a - m_b||^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, equation 6).

    With C = L L^T the trace of the root is the nuclear norm of L_a^T L_b. Singular values carry an error of machine
    precision, whereas square roots of the eigenvalues of C_a C_b would carry its root; degenerate covariances (fewer
    samples than dimensions) need no regularisation. `Moments` caches its factor, so a reference's is computed once.

    Raises:
        UserError: The widths differ.
    """
    if a.width != b.width:
        raise UserError(f"features of width {a.width} cannot be compared with a reference of width {b.width}")
    shift = a.mean - b.mean
    cross = 0.0
    if a.factor.size and b.factor.size:
        cross = float(np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum())
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))


def _fid(samples: SampleSet, reference: ReferenceSet) -> float:
    return frechet_distance(samples.moments, reference.pooled)


def _sfid(samples: SampleSet, reference: ReferenceSet) -> float:
    assert samples.spatial is not None
    assert reference.spatial is not None
    return frechet_distance(samples.spatial, reference.spatial)


FID = DistributionMetric(name="fid", title="Fréchet distance", format=".2f", higher_is_better=False, compute=_fid)
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
