"""Draws the report's curves with matplotlib, as inline SVG that takes the page's text colour, light or dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # placeholder for the page's text colour; replaced by `currentColor`
ACCENT = "#2f6fdb"
SECOND = "#d9722b"
COLOURS = (ACCENT, SECOND, "#2a9d76", "#9a5fc4", "#c2456b", "#7f8a99")
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
}


@dataclass(frozen=True)
class Curve:
    """A labelled curve; `errors` are standard deviations, drawn as bars unless all are 0."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None


def training_curve(
    x: Sequence[float], y: Sequence[float], *, name: str, log: bool = False, smooth: bool = False
) -> str:
    """A quantity against the training step; if smoothed, the raw values are a faint line behind it."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.3)
        if smooth and len(y) > 20:
            axes.plot(x, y, color=ACCENT, linewidth=0.7, alpha=0.3)
            axes.plot(x, _smoothed(y), color=ACCENT, linewidth=1.6)
        else:
            axes.plot(x, y, color=ACCENT, linewidth=1.6, marker="o" if len(x) < 3 else None, markersize=4)
        if log and 0 < min(y) < max(y) / 5:
            _log_scale(axes, min(y), max(y))
        else:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
            if min(y) == max(y):
                axes.set_ylim(0, 2 * y[0] or 1)
        axes.set_xlabel("step")
        _thousands(axes)
        return _svg(figure, name)


def training_curves(curves: Sequence[Curve], *, name: str, log: bool = False) -> str:
    """Several smoothed quantities against the training step."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.7)
        for curve, colour in zip(curves, cycle(COLOURS), strict=False):
            marker = "o" if len(curve.x) < 3 else None
            shown = _smoothed(curve.y) if len(curve.y) > 20 else curve.y
            axes.plot(curve.x, shown, label=curve.label, color=colour, linewidth=1.4, marker=marker, markersize=4)
        low, high = (each(value for curve in curves for value in curve.y) for each in (min, max))
        if log and 0 < low < high / 5:
            _log_scale(axes, low, high)
        else:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")
        axes.set_xlabel("step")
        _thousands(axes)
        axes.legend(loc="best")
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
        axes.set_ylim(bottom=0)
        axes.set_xlabel("network evaluations per sample")
        axes.set_ylabel(y_label)
        axes.legend(loc="upper right")
        return _svg(figure, name)


def progress_curve(curves: Sequence[Curve], *, name: str, y_label: str) -> str:
    """A score against the training step, with error bars."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.7)
        _draw(axes, curves)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("training step")
        axes.set_ylabel(y_label)
        _thousands(axes)
        axes.legend(loc="upper right")
        return _svg(figure, name)


def time_curve(curves: Sequence[Curve], *, name: str, y_label: str) -> str:
    """Quantities against the noise level, on two logarithmic axes."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _panel(4.6, 2.7)
        for curve, colour in zip(curves, cycle(COLOURS), strict=False):
            axes.plot(curve.x, curve.y, label=curve.label, color=colour, linewidth=1.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("time t")
        axes.set_ylabel(y_label)
        axes.legend(loc="best")
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
        axes.set_ylim(bottom=0)
        axes.set_xlabel("averaged steps (standard deviation)")
        axes.set_ylabel(y_label)
        axes.legend(loc="best")
        return _svg(figure, name)


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, curves: Sequence[Curve], levels: Sequence[tuple[str, float]] = ()) -> None:
    for curve, colour in zip(curves, cycle(COLOURS), strict=False):
        bars = curve.errors if curve.errors and any(curve.errors) else None
        style = {"color": colour, "linewidth": 1.6, "marker": "o", "markersize": 4.5, "capsize": 3}
        axes.errorbar(curve.x, curve.y, yerr=bars, label=curve.label, **style)
    for label, value in levels:
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.55, label=label)


def _log_scale(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers: 1, 2 and 5 of each decade, or only the decades if there are many."""
    axes.set_yscale("log")
    digits = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=digits, numticks=8))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _thousands(axes: Axes) -> None:
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}")


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
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{name}"', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # matplotlib uses the same group names in every figure
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
