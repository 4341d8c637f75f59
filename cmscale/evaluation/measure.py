"""Owns the way from features to numbers: one pass over blocks of features, all metrics at its end.

    extractor = build_features("inception", weights=path, device=device)
    reference = read_reference("lsun_bedroom.npz", extractor)
    blocks = image_blocks(images.read(), extractor)
    measured = measure(blocks, num_samples=images.count, reference=reference)  # finished images, one process

Of samples on ranks rank 0 measures the distributions, all ranks share the nearest neighbours: `measuring.Bench`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.blocks import BLOCK
from cmscale.evaluation.features.extractor import FeatureExtractor, Features
from cmscale.evaluation.images import batches
from cmscale.evaluation.metrics.distributions import InceptionScoreSums, frechet_distance, kernel_distance
from cmscale.evaluation.metrics.neighbours import DENSITY_K, Manifold, compare
from cmscale.evaluation.metrics.statistics import Sums, total
from cmscale.evaluation.reference.reference import Reference


def image_blocks(
    images: Iterable[np.ndarray], extractor: FeatureExtractor
) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
    """Features of finished images (uint8 [H, W, 3]), block by block."""
    at = 0
    for batch in batches(images, BLOCK):
        yield range(at, at + len(batch)), extractor(batch)
        at += len(batch)


def measure(blocks: Iterable[tuple[range, Features]], *, num_samples: int, reference: Reference) -> dict[str, float]:
    """Every metric of one set of samples for which the features and the reference suffice, in this process.

    The covariance's square root and the reference's neighbours are computed once a reference, not once a call.

    Args:
        blocks: index ranges and their features, ascending, 0 to num_samples without a gap.

    Raises:
        UserError: fewer than two samples, a feature that is not finite, other widths than the reference's.
    """
    found, pooled = measure_distributions(blocks, num_samples=num_samples, reference=reference)
    if reference.manifold is not None and num_samples > DENSITY_K:
        found |= measure_neighbours(Manifold(pooled, device=reference.device), reference.manifold)
    return found


def measure_distributions(
    blocks: Iterable[tuple[range, Features]], *, num_samples: int, reference: Reference
) -> tuple[dict[str, float], np.ndarray]:
    """`measure` without the metrics of nearest neighbours, and the pooled features [num_samples, D] for those.

    Memory holds the pooled features in float32, the sums and one block.
    """
    if num_samples < 2:
        raise UserError(f"evaluation: {num_samples} sample(s); it takes at least 2")
    pooled = np.empty((num_samples, reference.pooled.width), dtype=np.float32)
    spatial: Sums | None = None
    sums: Sums | None = None
    scores = InceptionScoreSums(num_samples)
    at = 0
    for block, features in blocks:
        assert block.start == at, f"block {block} where sample {at} is next"
        if not np.isfinite(features["pooled"]).all():
            raise UserError(f"evaluation: samples {block.start} to {block.stop - 1} give features that are not finite")
        pooled[block.start : block.stop] = features["pooled"]
        sums = _added(sums, features["pooled"])
        if "logits" in features:
            scores.add(block, features["logits"])
        if "spatial" in features and reference.spatial is not None:
            spatial = _added(spatial, features["spatial"])
        at = block.stop
    assert at == num_samples, f"{at} samples where {num_samples} were announced"
    assert sums is not None
    found = {"fid": frechet_distance(sums.moments(), reference.pooled)}
    if spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet_distance(spatial.moments(), reference.spatial)
    if scores.has_samples:
        found["inception_score"], found["inception_score_split_std"] = scores.score()
    if reference.subset is not None and len(reference.subset) > 1:
        found["kid"], found["kid_subset_std"] = kernel_distance(pooled, reference.subset)
    return found, pooled


def _added(sums: Sums | None, features: np.ndarray) -> Sums:
    return total(part for part in (sums, Sums.of(features)) if part is not None)


def measure_neighbours(samples: Manifold, reference: Manifold) -> dict[str, float]:
    """Precision, recall, density, coverage, on all ranks of the samples' world. Collective."""
    return asdict(compare(samples, reference))


def left_out(reference: Reference, *, num_samples: int, features: str) -> list[str]:
    """One line for each group of metrics that `measure` can't give, and why."""
    lines = []
    if features.startswith("dinov2"):
        lines.append("no Inception Score: DINOv2 has no classes")
    if reference.spatial is None or features != "inception":
        lines.append("no sFID: the reference or the network has no spatial features")
    if reference.subset is None:
        lines.append("no KID, precision, recall: the reference holds statistics without images")
    elif reference.manifold is None or num_samples <= DENSITY_K:
        lines.append(f"no precision, recall: they need more than {DENSITY_K} samples on each side")
    return lines
