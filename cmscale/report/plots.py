"""Draws the report's curves with matplotlib, as inline SVG that takes the page's text colour, light or dark."""

import html
import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmscale.report.measured import Band

INK = "#010203"  # placeholder for the page's text colour; replaced by `currentColor`
ACCENT = "#2f6fdb"
SECOND = "#d9722b"
COLOURS = (ACCENT, SECOND, "#2a9d76", "#9a5fc4", "#c2456b", "#7f8a99")
_DASHES = ((5, 3), (1, 2), (6, 2, 1, 2), (10, 3))
_STYLES = tuple((colour, line) for line in ("-", *((0, dashes) for dashes in _DASHES)) for colour in COLOURS)
"""Colour and line of the curves of a plot, which tell 30 apart."""
_LETTERS = 66  # of a legend that fit beside each other
_SAMPLE = 8  # letters that have the room of a sample of a line
_LINE = 0.17  # inches
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a run may be called `a$b$`
}


@dataclass(frozen=True)
class Curve:
    """A labelled curve.

    Attributes:
        errors: Standard deviations, drawn as bars unless all are 0.
        low, high: The range of the values that each point stands for, drawn as a band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def banded(label: str, band: Band) -> Curve:
    """The curve of a quantity of metrics.jsonl; with a band, if its points stand for several values."""
    if not band.is_joined:
        return Curve(label, band.steps.tolist(), band.mean.tolist())
    return Curve(label, band.steps.tolist(), band.mean.tolist(), low=band.low.tolist(), high=band.high.tolist())


def training_curves(
    curves: Sequence[Curve],
    *,
    name: str,
    log: bool = False,
    smooth: bool = True,
    named: bool = False,
    by: str = "step",
) -> str:
    """Quantities against the training step: each with its band, or as a smoothed line before its faint raw values.

    Args:
        by: What the curves are drawn against in place of the step.
        named: Whether a single curve has a name too, as it is of one run among several.
    """
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.5)
        for curve, (colour, line) in zip(curves, cycle(_STYLES), strict=False):
            marker = "o" if len(curve.x) < 3 else None
            shown = curve.y
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.22, linewidth=0)
            elif smooth and len(curve.y) > 20:
                axes.plot(curve.x, curve.y, color=colour, linewidth=0.7, alpha=0.3)
                shown = _smoothed(curve.y)
            style = {"color": colour, "linestyle": line, "linewidth": 1.5, "marker": marker, "markersize": 4}
            axes.plot(curve.x, shown, label=_shown(curve.label), **style)
        low = min(min(curve.low or curve.y) for curve in curves)
        high = max(max(curve.high or curve.y) for curve in curves)
        if log and 0 < low < high / 5:
            _log_scale(axes, low, high)
        else:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
            if low == high:
                axes.set_ylim(0, 2 * low or 1)
        axes.set_xlabel(by)
        _thousands(axes)
        if len(curves) > 1 or named:
            _legend(figure, axes)
        return _svg(figure, name)


def steps_curve(curves: Sequence[Curve], *, name: str, y_label: str, levels: Sequence[tuple[str, float]] = ()) -> str:
    """A score against network evaluations per sample, with error bars; `levels` (label, value) are dashed lines."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.7)
        _draw(axes, curves, levels)
        axes.set_xscale("log", base=2)
        ticks = sorted({value for curve in curves for value in curve.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        _from_zero(axes)
        axes.set_xlabel("network evaluations per sample")
        axes.set_ylabel(y_label)
        _legend(figure, axes)
        return _svg(figure, name)


def progress_curve(
    curves: Sequence[Curve],
    *,
    name: str,
    y_label: str,
    levels: Sequence[tuple[str, float]] = (),
    by: str = "training step",
) -> str:
    """A score against progress, `by` steps or images, with error bars; `levels` as in `steps_curve`."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.7)
        _draw(axes, curves, levels)
        _from_zero(axes)
        axes.set_xlabel(by)
        axes.set_ylabel(y_label)
        _thousands(axes)
        _legend(figure, axes)
        return _svg(figure, name)


def time_curve(curves: Sequence[Curve], *, name: str, y_label: str) -> str:
    """Quantities against the noise level, on two logarithmic axes."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.7)
        for curve, colour in zip(curves, cycle(COLOURS), strict=False):
            axes.plot(curve.x, curve.y, label=_shown(curve.label), color=colour, linewidth=1.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("time t")
        axes.set_ylabel(y_label)
        _legend(figure, axes)
        return _svg(figure, name)


def ema_curve(curves: Sequence[Curve], *, name: str, y_label: str, levels: Sequence[tuple[str, float]] = ()) -> str:
    """A score against the number of steps that an average spans, with error bars; `levels` as in `steps_curve`."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.7)
        _draw(axes, curves, levels)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.3g}k" if value >= 10_000 else f"{value:g}")
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        ticks = sorted({round(value) for curve in curves for value in curve.x})
        axes.set_xticks(ticks)
        _from_zero(axes)
        axes.set_xlabel("averaged steps (standard deviation)")
        axes.set_ylabel(y_label)
        _legend(figure, axes)
        return _svg(figure, name)


def _legend(figure: Figure, axes: Axes) -> None:
    """Names the curves above the axes, where no curve can run through the names; the figure grows by these lines."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [_in_lines(label) for label in labels]
    rows = next(rows for rows in range(1, len(labels) + 1) if rows == len(labels) or _width(labels, rows) <= _LETTERS)
    columns = [labels[start : start + rows] for start in range(0, len(labels), rows)]
    figure.legend(handles, labels, loc="outside upper left", ncols=len(columns), columnspacing=1.2, borderaxespad=0.0)
    lines = max(sum(1 + label.count("\n") for label in column) for column in columns)
    figure.set_figheight(figure.get_figheight() + _LINE * lines)


def _in_lines(label: str) -> str:
    """A label in lines that the figure has room for: its end may be what tells it apart."""
    return "\n".join(textwrap.wrap(label, _LETTERS - _SAMPLE + 2, break_on_hyphens=False)) or label


def _width(labels: Sequence[str], rows: int) -> int:
    """Letters of the widest lines of a legend's columns, with room for the samples of lines."""
    columns = (labels[start : start + rows] for start in range(0, len(labels), rows))
    return sum(max(len(line) for label in column for line in label.split("\n")) + _SAMPLE for column in columns)


def _shown(label: str) -> str:
    """A label as matplotlib shows it: it leaves out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, curves: Sequence[Curve], levels: Sequence[tuple[str, float]] = ()) -> None:
    for curve, (colour, line) in zip(curves, cycle(_STYLES), strict=False):
        bars = curve.errors if curve.errors and any(curve.errors) else None
        style = {"color": colour, "linestyle": line, "linewidth": 1.6, "marker": "o", "markersize": 4.5, "capsize": 3}
        axes.errorbar(curve.x, curve.y, yerr=bars, label=_shown(curve.label), **style)
    for (label, value), dashes in zip(levels, cycle(_DASHES), strict=False):
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, dashes), alpha=0.6, label=_shown(label))


def _from_zero(axes: Axes) -> None:
    """The axis from zero to above all that is drawn, however little that varies."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.06 * top if top > 0 else 1)


def _log_scale(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers: 1, 2 and 5 of each decade, or only the decades if there are many."""
    axes.set_yscale("log")
    digits = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=digits, numticks=8))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _thousands(axes: Axes) -> None:
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    """A number of an axis: 9000, 10k, 10M."""
    if value >= 10_000_000:
        return f"{value / 1_000_000:g}M"
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential average over about a thirtieth of the curve, corrected for the bias at its start."""
    keep = 1 - 1 / max(5.0, len(values) / 30)
    total = weight = 0.0
    found = []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        found.append(total / weight)
    return found


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element; `name` makes its ids differ from those of other figures on the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name's, which the browser's font may have
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    described = f'role="img" aria-label="{html.escape(name)}"'
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: described, text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # matplotlib uses the same group names in every figure
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
