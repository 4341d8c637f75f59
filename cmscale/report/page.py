"""Owns the assembly of report/index.html: facts and plots into one self-contained page."""

import base64
import datetime
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from cmscale.io.durable import replace_durably
from cmscale.report.facts import RunFacts, read_facts
from cmscale.report.paper import PAPER
from cmscale.report.plots import Curve, time_curve, training_curve
from cmscale.report.quality import quality_panels
from cmscale.runs.folder import RunDir
from cmscale.runs.results import EvaluationResult, Metric

_MAX_IMAGE = 1024
_MAX_GRIDS = 6
_MAX_EVENTS = 200
_COLUMNS = (
    ("sFID", "sfid"),
    ("IS", "inception_score"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("KID", "kid"),
    ("density", "density"),
    ("coverage", "coverage"),
)
_FEATURES = {"inception": "FID Inception", "efficientnet_lite0": "EfficientNet-Lite0"}


def build_report(run: RunDir, *, siblings: Sequence[RunDir] = ()) -> Path:
    """Writes the page of a run and returns its path. Whatever the run has not yet is left out.

    Args:
        siblings: other runs to stand beside in tables and curves, a teacher above all.

    Raises:
        UserError: no such run.
    """
    facts = read_facts(run)
    environment = Environment(
        loader=PackageLoader("cmscale.report", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(_contents(facts, [read_facts(each) for each in siblings]))
    replace_durably(run.report, page.encode())
    return run.report


def _contents(facts: RunFacts, siblings: list[RunFacts]) -> dict[str, Any]:
    everyone = [facts, *siblings]
    rows = [_row(each, owner) for owner in everyone for each in owner.evaluations]
    return {
        "facts": facts,
        "size": facts.setting("model.image_size"),
        "progress": min(1.0, facts.step / facts.total_steps) if facts.total_steps else None,
        "tiles": _tiles(facts),
        "grids": _grids(facts),
        "curves": _training(facts),
        "evaluations": rows,
        "columns": [(title, key) for title, key in _COLUMNS if any(row["cells"][key][0] for row in rows)],
        "several_runs": bool(siblings),
        "score_names": sorted({each.score_name for owner in everyone for each in owner.evaluations}),
        "warnings": _warnings(everyone),
        "quality": quality_panels(everyone),
        "paper": PAPER,
        "events": _events(facts),
        "timeline": _timeline(facts),
        "starts": [start for start in facts.provenance.get("starts", []) if isinstance(start, dict)],
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    """The numbers at the top: what, value, remark."""
    tiles = [("steps", f"{facts.step:,}", f"of {facts.total_steps:,}" if facts.total_steps else "")]
    if facts.metrics:
        last = facts.metrics[-1]
        if "samples" in last:
            tiles.append(
                (
                    "images seen",
                    f"{last['samples']:,}",
                    f"batch {facts.setting('train.global_batch_size', '?')}",
                )
            )
        if "loss" in last:
            recent = [record["loss"] for record in facts.metrics[-10:] if "loss" in record]
            tiles.append(("loss", f"{sum(recent) / len(recent):.4g}", f"from {facts.metrics[0].get('loss', 0):.4g}"))
        rates = sorted(record["images_per_second"] for record in facts.metrics if record.get("images_per_second"))
        if rates:
            tiles.append(("images/s", f"{rates[len(rates) // 2]:,.4g}", "median"))
    if facts.evaluations:
        best = min(facts.evaluations, key=lambda each: each.fid.mean)
        tiles.append((f"best {best.score_name}", f"{best.fid.mean:.4g}", f"step {best.step}, {best.nfe} NFE"))
    return tiles


def _grids(facts: RunFacts) -> list[dict[str, Any]]:
    """Sample grids evenly over the run, the first and the last among them."""
    count = len(facts.grids)
    chosen = sorted({round(i * (count - 1) / (_MAX_GRIDS - 1)) for i in range(_MAX_GRIDS)}) if count else []
    return [{"step": facts.grids[i][0], "source": _inlined(facts.grids[i][1])} for i in chosen]


def _inlined(path: Path) -> str:
    """An image file as a data URL; large ones are scaled down."""
    with Image.open(path) as image:
        shown = image.convert("RGB")
        if max(shown.size) <= _MAX_IMAGE:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        shown.thumbnail((_MAX_IMAGE, _MAX_IMAGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _training(facts: RunFacts) -> list[tuple[str, str]]:
    """(title, svg) of every logged quantity that there is."""
    panels = [
        ("Loss", "loss", True, True),
        ("Learning rate", "lr", False, False),
        ("Discretisation N(k)", "num_scales", False, False),
        ("Target network's EMA μ(k)", "target_ema", False, False),
        ("Gradient norm", "grad_norm", True, True),
        ("Consistency error", "consistency_error", True, False),
        ("Images a second", "images_per_second", False, True),
    ]
    found = []
    for title, key, log, smooth in panels:
        points = [(record["step"], record[key]) for record in facts.metrics if _is_number(record.get(key))]
        if points:
            x, y = zip(*points, strict=True)
            found.append((title, training_curve(x, y, name=title, log=log, smooth=smooth)))
    return found + _consistency(facts)


def _consistency(facts: RunFacts) -> list[tuple[str, str]]:
    """(title, svg) of the newest consistency error against time, where one was measured."""
    if not facts.consistency:
        return []
    last = facts.consistency[-1]
    curves = [
        Curve("to the next time", last["times"][1:], last["neighbours"]),
        Curve("to the one-step sample", last["times"][1:], last["to_start"][1:]),
    ]
    title = f"Consistency error against time, step {last['step']:,}, {last['weights']}"
    return [(title, time_curve(curves, name=title, y_label="difference of f"))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _row(result: EvaluationResult, owner: RunFacts) -> dict[str, Any]:
    metrics = {
        "score": (result.fid, ".2f"),
        "sfid": (result.sfid, ".2f"),
        "inception_score": (result.inception_score, ".2f"),
        "precision": (result.precision, ".3f"),
        "recall": (result.recall, ".3f"),
        "kid": (result.kid, ".4g"),
        "density": (result.density, ".3f"),
        "coverage": (result.coverage, ".3f"),
    }
    return {
        "result": result,
        "run": owner.name,
        "times": ", ".join(f"{time:.4g}" for time in result.times or ()),
        "features": _FEATURES.get(result.features, result.features),
        "cells": {name: _cell(metric, form) for name, (metric, form) in metrics.items()},
    }


def _cell(metric: Metric | None, form: str) -> tuple[str, str]:
    """A metric as (mean, deviation); the deviation of a single value is left out."""
    if metric is None:
        return "", ""
    return f"{metric.mean:{form}}", f"± {metric.std:{form}}" if len(metric.values) > 1 else ""


def _warnings(everyone: list[RunFacts]) -> list[str]:
    """A line for each different warning, with the evaluations that it came with."""
    said: dict[str, dict[str, list[str]]] = {}
    for owner in everyone:
        for each in owner.evaluations:
            for warning in each.warnings:
                whose = said.setdefault(warning, {}).setdefault(owner.name, [])
                whose.append(
                    "finished samples" if each.step is None else f"step {each.step} {each.weights} NFE {each.nfe}"
                )
    total = sum(len(owner.evaluations) for owner in everyone)
    lines = []
    for warning, owners in said.items():
        which = "; ".join(f"{name}, {', '.join(evaluations)}" for name, evaluations in owners.items())
        count = sum(map(len, owners.values()))
        lines.append(f"{warning} ({f'all {total} evaluations' if count == total > 1 else which})")
    return lines + [line for owner in everyone for line in owner.unreadable]


def _events(facts: RunFacts) -> list[dict[str, Any]]:
    """The newest events, in their order; what they say beyond the common keys is joined to their reason."""
    shown = []
    for event in facts.events[-_MAX_EVENTS:]:
        more = {key: value for key, value in event.items() if key not in ("time", "event", "step", "rank", "why")}
        details = ", ".join(f"{key} {value}" for key, value in more.items())
        shown.append({**event, "at": _time(event.get("time")), "details": details})
    return shown


def _timeline(facts: RunFacts) -> list[tuple[float, str, str]]:
    """(percent of the run's time, event, label) of every event but the checkpoints' mass."""
    timed = [event for event in facts.events if _is_number(event.get("time"))]
    if len(timed) < 2 or timed[-1]["time"] <= timed[0]["time"]:
        return []
    first, span = timed[0]["time"], timed[-1]["time"] - timed[0]["time"]
    return [
        (
            100 * (event["time"] - first) / span,
            str(event["event"]),
            f"{event['event']} at step {event.get('step')}, {_time(event['time'])}",
        )
        for event in timed
    ]


def _time(value: Any) -> str:
    if not _is_number(value):
        return str(value or "")
    return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
