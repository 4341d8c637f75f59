"""Arranges evaluations for the page: the best first, then the newest, with what limits each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cmscale.evaluation.metrics.frechet import FID
from cmscale.evaluation.metrics.registry import MetricDefinition, all_metrics
from cmscale.report.facts import RunFacts
from cmscale.runs.comparison import best_by_score, reference_names
from cmscale.runs.results import EvaluationResult

MOST_ROWS = 20
"""Of a table; older results are folded."""


@dataclass(frozen=True)
class Row:
    """A result in a table.

    Attributes:
        cells: Value and deviation of each metric, by name.
        notes: Numbers of the notes under the tables that are about this result.
    """

    result: EvaluationResult
    run: str
    times: str
    reference: str
    score: tuple[str, str]
    cells: dict[str, tuple[str, str]]
    is_best: bool
    notes: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """The results over one network's features, whose metrics have names of their own.

    Attributes:
        columns: (title, name) of the metrics beside the Fréchet distance.
    """

    score_name: str
    features: str
    columns: list[tuple[str, str]]
    references: list[str]
    rows: list[Row] = field(default_factory=list)


def tables(runs: Sequence[RunFacts], *, notes: Sequence[str]) -> list[Table]:
    """The tables of all results, by score.

    Args:
        notes: The distinct warnings, in the order of the notes.
    """
    shown = [(owner, each) for owner in runs for each in owner.evaluations]
    features = sorted({(each.score_name, each.features) for _, each in shown})
    best = best_by_score(runs[0].evaluations)
    return [
        _table(
            [pair for pair in shown if (pair[1].score_name, pair[1].features) == which],
            best=best,
            notes={warning: number for number, warning in enumerate(notes, start=1)},
        )
        for which in features
    ]


def _table(
    shown: Sequence[tuple[RunFacts, EvaluationResult]], *, best: Sequence[EvaluationResult], notes: dict[str, int]
) -> Table:
    metrics = all_metrics()
    results = [each for _, each in shown]
    score_name, references = results[0].score_name, reference_names(results)
    rows = [
        _row(each, owner, reference, metrics, is_best=any(each is other for other in best), notes=notes)
        for (owner, each), reference in zip(shown, references, strict=True)
    ]
    return Table(
        score_name,
        results[0].features,
        [
            (metric.title_over(score_name), metric.name)
            for metric in metrics
            if metric.name != FID.name and any(metric.name in each.metrics for each in results)
        ],
        list(dict.fromkeys(references)),
        sorted(rows, key=lambda row: (not row.is_best, -(row.result.step or 0), -row.result.num_samples)),
    )


def _row(
    result: EvaluationResult,
    owner: RunFacts,
    reference: str,
    metrics: Sequence[MetricDefinition],
    *,
    is_best: bool,
    notes: dict[str, int],
) -> Row:
    return Row(
        result=result,
        run=owner.name,
        times=", ".join(f"{time:.4g}" for time in result.times or ()),
        reference=reference,
        score=FID.formatted(result.fid),
        cells={
            metric.name: metric.formatted(result.metrics[metric.name])
            for metric in metrics
            if metric.name in result.metrics
        },
        is_best=is_best,
        notes=tuple(sorted({notes[warning] for warning in result.warnings})),
    )


def warnings(runs: Sequence[RunFacts]) -> dict[str, str]:
    """By distinct warning the line about it, which names the evaluations that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for owner in runs:
        for each in owner.evaluations:
            for warning in each.warnings:
                name = "existing images" if each.step is None else f"step {each.step} {each.weights} NFE {each.nfe}"
                found.setdefault(warning, {}).setdefault(owner.name, []).append(name)
    total = sum(len(owner.evaluations) for owner in runs)
    lines = {}
    for warning, owners in found.items():
        which = "; ".join(f"{name}, {_listed(evaluations)}" for name, evaluations in owners.items())
        count = sum(map(len, owners.values()))
        lines[warning] = f"{warning} ({f'all {total} evaluations' if count == total > 1 else which})"
    return lines


def _listed(names: Sequence[str], most: int = 8) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
