"""Draws what was logged during training, of one run or of several beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmscale.report.facts import RunFacts
from cmscale.report.measured import Band, decimated
from cmscale.report.plots import Curve, banded, time_curve, training_curves

_QUANTITIES = (
    ("Loss", "loss", True, True),
    ("Learning rate", "lr", False, False),
    ("Discretisation N(k)", "num_scales", False, False),
    ("Target network's EMA μ(k)", "target_ema", False, False),
    ("Gradient norm", "grad_norm", True, True),
    ("Loss scale", "loss_scale", True, False),
    ("Consistency error", "consistency_error", True, False),
    ("Images per second", "images_per_second", False, True),
    ("Share of the peak rate (MFU)", "mfu", False, True),
    ("Peak memory of rank 0 in GiB", "peak_memory_gib", False, False),
)
"""Title, key in metrics.jsonl, whether on a logarithmic axis, whether noisy."""
_BY_NOISE = (
    ("Loss by quartile of the noise", "loss", True),
    ("Norm of the tangent g by quartile of the noise", "tangent_norm", True),
    ("Learned weighting w(t) by quartile of the noise", "weighting", False),
)
_QUARTILES = {1: "1, least noise", 2: "2", 3: "3", 4: "4, most noise"}


@dataclass(frozen=True)
class Panel:
    """A plot of the page, and its numbers for who wants to plot them.

    Attributes:
        note: What the drawing stands for, in words.
        columns, rows: The numbers.
    """

    title: str
    svg: str
    note: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()


def training_panels(runs: Sequence[RunFacts]) -> tuple[list[Panel], list[tuple[str, str]]]:
    """The panels of every quantity that was logged, and (title, value) of those that never changed.

    Args:
        runs: The run that the page is about, then those beside it.
    """
    panels, constant = [], []
    for title, key, log, noisy in _QUANTITIES:
        shown = [(owner.name, owner.measured.of(key)) for owner in runs]
        shown = [(name, series) for name, series in shown if len(series)]
        if not shown:
            continue
        levels = {level for _, series in shown for level in (series.values.min(), series.values.max())}
        if len(levels) == 1 and sum(len(series) for _, series in shown) > len(shown):
            constant.append((title, f"{levels.pop():.6g}"))
            continue
        bands = [(name, decimated(series)) for name, series in shown]
        panels.append(_panel(title, bands, log=log, smooth=noisy, named=len(runs) > 1))
    return panels + _by_noise(runs[0]) + _consistency(runs[0]), constant


def _by_noise(facts: RunFacts) -> list[Panel]:
    """What was logged by quartile of the noise."""
    found = []
    for title, key, log in _BY_NOISE:
        series = [(label, facts.measured.of(f"{key}_q{quartile}")) for quartile, label in _QUARTILES.items()]
        bands = [(label, decimated(each)) for label, each in series if len(each)]
        if bands:
            found.append(_panel(title, bands, log=log, smooth=True))
    return found


def _panel(title: str, bands: Sequence[tuple[str, Band]], *, log: bool, smooth: bool, named: bool = False) -> Panel:
    curves = [banded(label, band) for label, band in bands]
    svg = training_curves(curves, name=title, log=log, smooth=smooth, named=named)
    rows = [
        (label, f"{step:.10g}", *numbers)
        for label, band in bands
        for step, *numbers in zip(
            *(each.tolist() for each in (band.steps, band.mean, band.low, band.high, band.counts)), strict=True
        )
    ]
    joined = sum(int(band.counts.sum()) for _, band in bands if band.is_joined)
    points = sum(len(band.counts) for _, band in bands if band.is_joined)
    note = f"{joined:,} values in {points:,} points: their mean, and as a band their range" if joined else ""
    return Panel(title, svg, note, ("curve", "step", "mean", "least", "largest", "values"), tuple(rows))


def _consistency(facts: RunFacts) -> list[Panel]:
    """The consistency error against time at the newest step, over the most images."""
    if not facts.consistency:
        return []
    last = facts.consistency[-1]
    times = last["times"][1:]
    curves = [
        Curve("to the next time", times, last["neighbours"]),
        Curve("to the one-step sample", times, last["to_start"][1:]),
    ]
    title = f"Consistency error against time, step {last['step']:,}, {last['weights']}, {last['num_samples']} images"
    rows = zip(times, last["neighbours"], last["to_start"][1:], strict=False)
    columns = ("time", "to the next time", "to the one-step sample")
    return [Panel(title, time_curve(curves, name=title, y_label="difference of f"), "", columns, tuple(rows))]
