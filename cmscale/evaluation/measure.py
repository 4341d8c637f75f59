"""Computes metrics: one pass over blocks of features builds the inputs, then every metric of the registry follows.

    extractor = build_features("inception", weights=path, device=device)
    reference = read_reference("lsun_bedroom.npz", extractor)
    blocks = image_blocks(images.read(), extractor)
    measured = measure(blocks, num_samples=images.count, reference=reference)  # existing images, in one process

For samples that are drawn on several ranks, rank 0 computes the metrics of distributions and all ranks those of nearest
neighbours (`cmscale.evaluation.session`).
"""

from collections.abc import Collection, Iterable, Iterator
from typing import assert_never

import numpy as np

from cmscale.errors import UserError
from cmscale.evaluation.blocks import BLOCK
from cmscale.evaluation.features.extractor import FeatureExtractor, Features
from cmscale.evaluation.manifold import DENSITY_K, Manifold, NeighbourSets
from cmscale.evaluation.metrics.registry import (
    DistributionMetric,
    Need,
    NeighbourMetric,
    ReferenceSet,
    SampleSet,
    SetSizes,
    all_metrics,
)
from cmscale.evaluation.reference.reference import Reference
from cmscale.evaluation.sample_files import batches
from cmscale.evaluation.statistics import Sums, total


def image_blocks(
    images: Iterable[np.ndarray], extractor: FeatureExtractor
) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
    """Features of images (uint8 [H, W, 3]), block by block."""
    at = 0
    for batch in batches(images, BLOCK):
        yield range(at, at + len(batch)), extractor(batch)
        at += len(batch)


def measure(blocks: Iterable[tuple[range, Features]], *, num_samples: int, reference: Reference) -> dict[str, float]:
    """Every metric of one set of samples whose needs the features and the reference meet, in this process.

    What depends on the reference alone, its covariance's factor and its nearest neighbours, is computed only once.

    Args:
        blocks: Index ranges and their features, ascending, from 0 to `num_samples` without a gap.

    Raises:
        UserError: Fewer than two samples, a feature that is not finite, or widths that differ from the reference's.
    """
    found, pooled = measure_distributions(blocks, num_samples=num_samples, reference=reference)
    if reference.manifold is not None and num_samples > DENSITY_K:
        found |= measure_neighbours(Manifold(pooled, device=reference.device), reference.manifold)
    return found


def measure_distributions(
    blocks: Iterable[tuple[range, Features]], *, num_samples: int, reference: ReferenceSet
) -> tuple[dict[str, float], np.ndarray]:
    """The metrics of `measure` that need no nearest neighbours, and the pooled features [num_samples, D].

    Memory holds the pooled features and the logits in float32, the sums, and one block.
    """
    samples = _gather(blocks, num_samples=num_samples, reference=reference)
    found: dict[str, float] = {}
    for metric in all_metrics():
        if isinstance(metric, DistributionMetric) and all(_is_met(need, samples, reference) for need in metric.needs):
            found |= metric.values(samples, reference)
    return found, samples.pooled


def _gather(blocks: Iterable[tuple[range, Features]], *, num_samples: int, reference: ReferenceSet) -> SampleSet:
    if num_samples < 2:
        raise UserError(f"evaluation: {num_samples} sample(s); it needs at least 2")
    pooled = np.empty((num_samples, reference.pooled.width), dtype=np.float32)
    logits: np.ndarray | None = None
    sums: Sums | None = None
    spatial: Sums | None = None
    at = 0
    for block, features in blocks:
        assert block.start == at, f"block {block} where sample {at} is next"
        if not np.isfinite(features["pooled"]).all():
            raise UserError(f"evaluation: the features of samples {block.start} to {block.stop - 1} are not finite")
        pooled[block.start : block.stop] = features["pooled"]
        sums = _added(sums, features["pooled"])
        if "logits" in features:
            if logits is None:
                logits = np.empty((num_samples, features["logits"].shape[1]), dtype=np.float32)
            logits[block.start : block.stop] = features["logits"]
        if "spatial" in features and reference.spatial is not None:
            spatial = _added(spatial, features["spatial"])
        at = block.stop
    assert at == num_samples, f"{at} samples where {num_samples} were announced"
    assert sums is not None
    return SampleSet(pooled, sums.moments(), None if spatial is None else spatial.moments(), logits)


def _added(sums: Sums | None, features: np.ndarray) -> Sums:
    return total(part for part in (sums, Sums.of(features)) if part is not None)


def _is_met(need: Need, samples: SampleSet, reference: ReferenceSet) -> bool:
    match need:
        case Need.SPATIAL_FEATURES:
            return samples.spatial is not None and reference.spatial is not None
        case Need.CLASS_LOGITS:
            return samples.logits is not None
        case Need.REFERENCE_IMAGES:
            return _has_images(reference)
        case _:
            assert_never(need)


def _has_images(reference: ReferenceSet) -> bool:
    return reference.subset is not None and len(reference.subset) > 1


def measure_neighbours(samples: Manifold, reference: Manifold) -> dict[str, float]:
    """The metrics of nearest neighbours, on all ranks of the samples' world. Collective."""
    sets = NeighbourSets(samples, reference)
    return {metric.name: metric.compute(sets) for metric in all_metrics() if isinstance(metric, NeighbourMetric)}


def left_out(measured: Collection[str], *, reference: Reference) -> list[str]:
    """One line for all metrics that are missing from `measured` for the same reason.

    Args:
        measured: Names of the metrics that `measure` returned for this reference.
    """
    titles: dict[str, list[str]] = {}
    for metric in all_metrics():
        if metric.name not in measured:
            titles.setdefault(_reason(metric, reference), []).append(metric.title)
    return [f"no {', '.join(missing)}: {reason}" for reason, missing in titles.items()]


def caveats(result_metrics: Collection[str], sizes: SetSizes) -> list[str]:
    """One line per metric of `result_metrics` whose values say less than usual, as the sets are small."""
    lines = [metric.caveat(sizes) for metric in all_metrics() if metric.name in result_metrics]
    return [line for line in lines if line is not None]


def sizes_of(*, num_samples: int, reference: Reference) -> SetSizes:
    """The sizes of what a measurement compares."""
    subset = 0 if reference.subset is None else len(reference.subset)
    return SetSizes(samples=num_samples, reference=reference.count, subset=subset, width=reference.pooled.width)


def _reason(metric: DistributionMetric | NeighbourMetric, reference: Reference) -> str:
    """Why a metric was left out: what the reference lacks, else what the network's features lack."""
    if isinstance(metric, NeighbourMetric):
        if not _has_images(reference):
            return "the reference holds statistics without images"
        return f"more than {DENSITY_K} samples and reference images are needed"
    if Need.REFERENCE_IMAGES in metric.needs and not _has_images(reference):
        return "the reference holds statistics without images"
    if Need.SPATIAL_FEATURES in metric.needs:
        return "the reference or the feature network has no spatial features"
    if Need.CLASS_LOGITS in metric.needs:
        return "the feature network predicts no classes"
    return "the samples were measured before this metric existed"
