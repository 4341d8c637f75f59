"""Compares runs: differences of their configs, their curves and scores, on a terminal or as a page of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cmscale.config import Config
from cmscale.config.compare import Difference, compared
from cmscale.config.keys import written
from cmscale.errors import UserError
from cmscale.evaluation.metrics.frechet import FID
from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.io.place import Place
from cmscale.report.facts import RunFacts, read_several
from cmscale.report.grids_beside import GridRow, grid_rows
from cmscale.report.measured import Series, decimated
from cmscale.report.plots import banded, training_curves
from cmscale.report.quality import quality_panels
from cmscale.report.templates import template
from cmscale.runs.comparison import describe_groups, groups_of, once_each
from cmscale.runs.configs import config_of
from cmscale.runs.folder import RunDir

CURVES = (
    ("loss", "Loss", True),
    ("lr", "Learning rate", False),
    ("grad_norm", "Gradient norm", True),
    ("consistency_error", "Consistency error", True),
    ("images_per_second", "Images per second", False),
)
"""The quantities that are compared: key in metrics.jsonl, title, whether on a logarithmic axis."""
_TITLES = {key: title for key, title, _ in CURVES}
_IMAGES = "samples"
"""The images that a run has seen, in metrics.jsonl."""
UNREADABLE = "unreadable"
"""In place of a value of a config that can't be read."""
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=+*#@"
"""Where the terminal's encoding has no bars."""
_WIDTH = 40


@dataclass(frozen=True)
class Score:
    """A result of a run among those that may be compared with each other.

    Attributes:
        basis: What the results have in common, in words.
        metrics: Mean of each metric, by name.
        titles: Title of each metric over the features of the result, by name: `KID-EfficientNet` is no KID.
    """

    basis: str
    run: str
    step: int
    weights: str
    nfe: int
    name: str
    metrics: dict[str, float]
    titles: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """What several runs share and how they differ.

    Attributes:
        curves: By quantity the values of each run, as (step, value) by step.
        by_images: Whether curves are drawn by images seen, as the runs' batches differ, and not by step.
        scores: The results that are comparable, group by group, each group's best first.
        grids: Sample grids side by side.
        unreadable: What can't be compared and why: a line for each config, and each file.
    """

    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    curves: dict[str, tuple[list[tuple[int, float]], ...]]
    by_images: bool
    scores: tuple[Score, ...]
    facts: tuple[RunFacts, ...]
    grids: tuple[GridRow, ...] = ()
    unreadable: tuple[str, ...] = ()


def compare_runs(runs: Sequence[RunDir]) -> Comparison:
    """Reads runs and compares them; a config that this release can't read is left out, and the rest is not."""
    facts = tuple(read_several(runs))
    names = tuple(each.name for each in facts)
    differences, unreadable = _differences(runs)
    curves = {key: tuple(each.measured.of(key).points() for each in facts) for key in (*_TITLES, _IMAGES)}
    return Comparison(
        names=names,
        differences=differences,
        curves={key: points for key, points in curves.items() if any(points)},
        by_images=_batches_differ(facts),
        scores=tuple(_scores(facts, names)),
        facts=facts,
        grids=grid_rows(runs, names),
        unreadable=(*unreadable, *(f"{each.name}: {line}" for each in facts for line in each.unreadable)),
    )


def _batches_differ(facts: Sequence[RunFacts]) -> bool:
    """Whether the runs saw other numbers of images at a step; no, if one did not record it.

    Steps that were skipped or repeated count images too: they are far fewer than the 5 percent that are allowed.
    """
    recorded = [each.measured.of(_IMAGES) for each in facts if each.measured.records]
    if not recorded or not all(map(len, recorded)):
        return False
    batches = [each.values[-1] / max(each.steps[-1], 1) for each in recorded]
    return max(batches) > 1.05 * min(batches)


def _drawn(comparison: Comparison, key: str) -> list[tuple[str, Series]]:
    """The name and the curve of each run that has one; against images seen, where the comparison is by those."""
    found = []
    for facts in comparison.facts:
        series, seen = facts.measured.of(key), facts.measured.of(_IMAGES)
        if comparison.by_images:
            _, here, there = np.intersect1d(seen.steps, series.steps, return_indices=True)
            series = Series(seen.values[here].astype(np.int64), series.values[there])
        if len(series):
            found.append((facts.name, series))
    return found


def _differences(runs: Sequence[RunDir]) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """The differences of the configs that can be read, and what is wrong with the others."""
    configs: list[Config | None] = []
    unreadable: list[str] = []
    for run in runs:
        try:
            configs.append(config_of(Place(run.root)))
        except UserError as error:  # damaged, or of a later release
            configs.append(None)
            first, *more = error.args
            unreadable.append(f"{first} (and more: cmscale estimate {run.config} prints all)" if more else first)
    readable = [config for config in configs if config is not None]
    found = []
    for each in compared(readable) if readable else []:
        values = iter(each.values)
        shown = tuple(UNREADABLE if config is None else next(values) for config in configs)
        found.append(replace(each, values=shown))
    return tuple(found), tuple(unreadable)


def _scores(facts: Sequence[RunFacts], names: Sequence[str]) -> list[Score]:
    owners = {id(each): name for name, owner in zip(names, facts, strict=True) for each in owner.evaluations}
    found = []
    groups = groups_of(each for owner in facts for each in owner.evaluations if each.step is not None)
    for basis, group in zip(describe_groups(groups), groups, strict=True):
        by_run = [once_each([each for each in group if owners[id(each)] == name]) for name in names]
        for each in sorted((each for results in by_run for each in results), key=lambda each: each.fid.mean):
            metrics = {name: metric.mean for name, metric in each.metrics.items()}
            found.append(
                Score(
                    f"{each.score_name}, {basis}",
                    owners[id(each)],
                    each.step or 0,
                    each.weights or "",
                    each.nfe or 0,
                    each.score_name,
                    metrics,
                    {metric.name: metric.title_in(each) for metric in all_metrics() if metric.name in metrics},
                )
            )
    return found


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {
        "runs": list(comparison.names),
        "unreadable": list(comparison.unreadable),
        "differences": [vars(each) for each in comparison.differences],
        "curves": {key: dict(zip(comparison.names, points, strict=True)) for key, points in comparison.curves.items()},
        "scores": [vars(each) for each in comparison.scores],
    }


def bars(
    points: Sequence[tuple[int, float]],
    *,
    first: int,
    last: int,
    low: float,
    high: float,
    log: bool,
    signs: str = BARS,
    width: int = _WIDTH,
) -> str:
    """A curve as a row of bars: the mean of the values that fall on each, the one before where none do.

    It is blank before the first value and after the last.
    """
    scale = math.log if log else float
    groups: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        place = (step - first) / (last - first) if last > first else 0.0
        groups[min(int(place * width), width - 1)].append(scale(value))
    low, high = scale(low), scale(high)
    span = high - low or 1.0
    row, sign = "", " "
    for group in groups[: max(index for index, group in enumerate(groups) if group) + 1]:
        if group:
            sign = signs[round((len(signs) - 1) * (sum(group) / len(group) - low) / span)]
        row += sign
    return row


def axis_of(comparison: Comparison) -> str:
    """What the curves are drawn against."""
    return "images seen" if comparison.by_images else "step"


def curve_rows(
    comparison: Comparison, *, signs: str = BARS, width: int = _WIDTH
) -> list[tuple[str, str, str, str, str]]:
    """(quantity, run, bars, first value, last value) of every curve, runs on one scale."""
    rows = []
    for key, title, log in CURVES:
        series = _drawn(comparison, key)
        if not series:
            continue
        values = [value for _, each in series for value in (each.values.min(), each.values.max())]
        places = [place for _, each in series for place in (each.steps[0], each.steps[-1])]
        for name, each in series:
            drawn = bars(
                each.points(),
                first=min(places),
                last=max(places),
                low=min(values),
                high=max(values),
                log=log and min(values) > 0,
                signs=signs,
                width=width,
            )
            rows.append((title, name, drawn, f"{each.values[0]:.4g}", f"{each.values[-1]:.4g}"))
    return rows


def page(comparison: Comparison) -> bytes:
    """The comparison as a self-contained HTML page."""
    curves = []
    for key, title, log in CURVES:
        drawn = [banded(name, decimated(series)) for name, series in _drawn(comparison, key)]
        if drawn:
            svg = training_curves(drawn, name=title, log=log, named=True, by=axis_of(comparison))
            curves.append((title, svg))
    return (
        template("comparison.html.j2")
        .render(
            comparison=comparison,
            groups=_groups(comparison),
            curves=curves,
            measured={
                basis: {name: title for each in scores for name, title in each.titles.items() if name != FID.name}
                for basis, scores in _groups(comparison).items()
            },
            quality=quality_panels(comparison.facts, by_images=comparison.by_images),
            written=written,
        )
        .encode(errors="backslashreplace")  # names of files that are not UTF-8
    )


def _groups(comparison: Comparison) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {}
    for each in comparison.scores:
        found.setdefault(each.basis, []).append(each)
    return found
