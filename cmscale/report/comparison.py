"""Selects evaluations whose scores may be compared, and the best of them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from cmscale.evaluation.metrics.frechet import FID
from cmscale.runs.results import EvaluationResult


def best_by_score(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """For each score name the best of the results that are compared (see `best_of`)."""
    by_name: dict[str, list[EvaluationResult]] = defaultdict(list)
    for each in results:
        by_name[each.score_name].append(each)
    return [best_of(by_name[name]) for name in sorted(by_name)]


def best_of(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """The best score among results that have features, reference and number of samples in common.

    If there are several such groups, it is the one with the most samples, then the most results, then the newest step:
    a Fréchet distance falls with the number of samples, so a small evaluation says less than a large one.
    """
    groups: dict[tuple[Any, ...], list[EvaluationResult]] = defaultdict(list)
    for each in results:
        groups[_basis(each)].append(each)
    return FID.best(max(groups.values(), key=_weight))


def _basis(result: EvaluationResult) -> tuple[Any, ...]:
    """What two results must have in common for a comparison of their scores."""
    reference = result.reference.get("sha256") or result.reference.get("name")
    return result.score_name, result.features, reference, result.num_samples


def _weight(group: Sequence[EvaluationResult]) -> tuple[int, int, int]:
    return group[0].num_samples, len(group), max(each.step or 0 for each in group)
