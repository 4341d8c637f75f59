"""Draws scores against sampling steps, training steps and the EMA's length.

There is a set of plots for each group of results that may be compared, so that no curve mixes references or numbers of
samples.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cmscale.config.averages import length_of
from cmscale.report.facts import RunFacts
from cmscale.report.paper import published_for
from cmscale.report.plots import Curve, ema_curve, progress_curve, steps_curve
from cmscale.runs.comparison import basis_of, best_of, describe_groups, groups_of, once_each
from cmscale.runs.results import EvaluationResult, Metric

Level = tuple[str, float]


def quality_panels(runs: Sequence[RunFacts], *, by_images: bool = False) -> list[tuple[str, str, str]]:
    """(title, what is compared, svg) of every plot that has at least two points.

    The first run is the one that the page is about; others appear where their results may be compared with its own.

    Args:
        by_images: Whether progress is the images that a run has seen, and not its steps.
    """
    found = []
    # The number in a plot's name keeps the ids of its elements apart from those of other plots of that score.
    groups = _groups(runs)
    for number, (basis, group) in enumerate(zip(describe_groups(groups), groups, strict=True), start=1):
        name = group[0].score_name
        for title, plot in (
            (f"{name} against the number of sampling steps", _against_steps(runs, group, number)),
            (f"{name} over training", _over_training(runs, group, number, by_images=by_images)),
            (f"{name} against the EMA's length", _against_ema(runs[0], group, number)),
        ):
            if plot is not None:
                found.append((title, basis, plot))
    return found


def _groups(runs: Sequence[RunFacts]) -> list[list[EvaluationResult]]:
    """The results of all runs that may be compared, by score, those that count most first."""
    groups = groups_of(each for owner in runs for each in owner.evaluations)
    return sorted(groups, key=lambda group: group[0].score_name)


def _against_steps(runs: Sequence[RunFacts], group: list[EvaluationResult], number: int) -> str | None:
    """Each run's newest evaluations; another run with a single one, such as a teacher, is a horizontal line."""
    name = group[0].score_name
    curves: list[Curve] = []
    levels: list[Level] = []
    for owner in runs:
        for weights, mine in _grouped(_evaluations(owner, group), lambda each: each.weights or ""):
            newest = _newest(mine)
            plain = [each for each in newest if each.times is None]
            if owner is not runs[0] and len(plain) == 1:
                levels.append((f"{owner.name}, {plain[0].nfe} NFE", plain[0].fid.mean))
            elif plain:
                curves.append(_curve(f"{owner.name}, {weights}", [(each.nfe, each.fid) for each in plain]))
            if searched := _best_of_each([each for each in newest if each.times is not None]):
                points = [(each.nfe, each.fid) for each in searched]
                curves.append(_curve(f"{owner.name}, {weights}, searched times", points))
    if not any(len(curve.x) > 1 for curve in curves):
        return None
    levels += _published(runs[0], group)
    return steps_curve(curves, name=f"{name} against steps, group {number}", y_label=name, levels=levels)


def _over_training(
    runs: Sequence[RunFacts], group: list[EvaluationResult], number: int, *, by_images: bool
) -> str | None:
    """The score of each kind of weights and sampling that was measured at several steps.

    A run that has none of these is shown by points, beside one that has.
    """
    name = group[0].score_name
    curves: list[Curve] = []
    for owner in runs:
        if by_images and not len(owner.measured.of("samples")):
            continue  # nothing says how many it had seen
        of_run = f"{owner.name}, " if len(runs) > 1 else ""
        found = []
        for weights, mine in _grouped(_evaluations(owner, group), lambda each: each.weights or ""):
            plain = [each for each in mine if each.times is None]
            for nfe, same in _grouped(plain, lambda each: each.nfe or 0):
                points = [(_images_at(owner, each.step) if by_images else each.step, each.fid) for each in same]
                found.append(_curve(f"{of_run}{weights}, {nfe} NFE", points))
        curves += [curve for curve in found if len(curve.x) > 1] or found
    if not any(len(curve.x) > 1 for curve in curves):
        return None
    levels = _published(runs[0], group)
    title = f"{name} over training, group {number}"
    by = "images seen" if by_images else "training step"
    return progress_curve(curves, name=title, y_label=name, levels=levels, by=by)


def _images_at(owner: RunFacts, step: int | None) -> float:
    """The images that a run had seen at a step, between those of the records around it."""
    seen = owner.measured.of("samples")
    return float(np.interp(step or 0, [0, *seen.steps], [0, *seen.values]))


def _published(owner: RunFacts, group: list[EvaluationResult]) -> list[Level]:
    """The paper's numbers, where data, method and measurement are the same."""
    rows = published_for(
        kind=str(owner.setting("method.kind", "")),
        size=owner.setting("model.image_size"),
        data=f"{owner.setting('data.path', '')} {group[0].reference.get('name') or ''}",
        score_name=group[0].score_name,
        num_samples=group[0].num_samples,
    )
    return [(f"{row.method} in the paper, {row.nfe} NFE", row.fid) for row in rows]


def _against_ema(owner: RunFacts, group: list[EvaluationResult], number: int) -> str | None:
    """The newest step with several EMAs; weights that are no average are a horizontal line."""
    name = group[0].score_name
    curves: list[Curve] = []
    levels: list[Level] = []
    plain = [each for each in _evaluations(owner, group) if each.times is None]
    for nfe, mine in _grouped(plain, lambda each: each.nfe or 0):
        averaged = [(length, each) for each in mine if (length := _length(each)) is not None]
        steps = [each.step or 0 for _, each in averaged]
        several = [step for step in steps if steps.count(step) > 1]
        if not several:
            continue
        points = [(length, each.fid) for length, each in averaged if each.step == max(several)]
        curves.append(_curve(f"step {max(several)}, {nfe} NFE", points))
        levels += [
            (f"no EMA, {nfe} NFE", each.fid.mean)
            for each in mine
            if each.weights == "master" and each.step == max(several)
        ]
    if not curves:
        return None
    return ema_curve(curves, name=f"{name} against EMA, group {number}", y_label=name, levels=levels)


def _evaluations(owner: RunFacts, group: list[EvaluationResult]) -> list[EvaluationResult]:
    """The owner's results of a group, one for each network and sampling."""
    basis = basis_of(group[0])
    mine = [each for each in owner.evaluations if basis_of(each) == basis]
    return [each for each in once_each(mine) if each.step is not None and each.nfe]


def _newest(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    return [each for each in results if each.step == max(other.step or 0 for other in results)]


def _best_of_each(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """The best result for each number of network evaluations."""
    return [best_of(same) for _, same in _grouped(results, lambda each: each.nfe or 0)]


def _grouped(
    results: Sequence[EvaluationResult], key: Callable[[EvaluationResult], Any]
) -> list[tuple[Any, list[EvaluationResult]]]:
    return [(value, [each for each in results if key(each) == value]) for value in sorted({key(r) for r in results})]


def _length(result: EvaluationResult) -> float | None:
    """The standard deviation in steps of the average that was evaluated, `ema_0.999943` or `power_0.05`."""
    name = result.weights or ""
    if named := re.fullmatch(r"ema_(0?\.\d+)", name):
        return 1 / (1 - float(named[1]))
    relative = length_of(name)
    return None if relative is None else relative * (result.step or 0)


def _curve(label: str, points: Sequence[tuple[Any, Metric]]) -> Curve:
    ordered = sorted(points, key=lambda point: point[0])
    return Curve(
        label,
        [float(x) for x, _ in ordered],
        [metric.mean for _, metric in ordered],
        [metric.std for _, metric in ordered],
    )
