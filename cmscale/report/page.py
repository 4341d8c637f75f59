"""Assembles report/index.html, one self-contained page, from a run's facts and plots."""

import base64
import datetime
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from cmscale.errors import UserError
from cmscale.evaluation.metrics.frechet import FID
from cmscale.evaluation.metrics.registry import MetricDefinition, all_metrics
from cmscale.io.durable import replace_durably
from cmscale.io.pictures import BadImage, decode_picture
from cmscale.io.reading import read_regular
from cmscale.report.facts import RunFacts, read_facts
from cmscale.report.paper import PAPER
from cmscale.report.plots import Curve, time_curve, training_curve, training_curves
from cmscale.report.quality import quality_panels
from cmscale.runs.comparison import RULE, best_by_score, describe_basis, reference_names
from cmscale.runs.folder import RunDir
from cmscale.runs.results import EvaluationResult

_MAX_IMAGE = 1024
_MAX_GRIDS = 6
_MAX_EVENTS = 200


def build_report(run: RunDir, *, siblings: Sequence[RunDir] = ()) -> Path:
    """Writes the page of a run and returns its path. What the run does not have yet is left out.

    Args:
        siblings: Other runs, such as a teacher, that tables and curves show for comparison.

    Raises:
        UserError: The run does not exist.
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
    runs = [facts, *siblings]
    metrics = all_metrics()
    shown = [(owner, each) for owner in runs for each in owner.evaluations]
    grids, damaged = _grids(facts)
    features = sorted({(each.score_name, each.features) for _, each in shown})
    return {
        "facts": facts,
        "size": facts.setting("model.image_size"),
        "progress": min(1.0, facts.step / facts.total_steps) if facts.total_steps else None,
        "tiles": _tiles(facts),
        "grids": grids,
        "curves": _training(facts),
        "tables": [
            _table([pair for pair in shown if (pair[1].score_name, pair[1].features) == which], metrics)
            for which in features
        ],
        "rule": RULE,
        "several_runs": bool(siblings),
        "score_names": list(dict.fromkeys(name for name, _ in features)),
        "warnings": _warnings(runs) + damaged,
        "quality": quality_panels(runs),
        "paper": PAPER,
        "events": _events(facts),
        "timeline": _timeline(facts),
        "starts": _starts(facts),
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _starts(facts: RunFacts) -> list[dict[str, Any]]:
    """What is shown of each start; of what a damaged file has in its place, nothing."""
    starts = facts.provenance.get("starts")
    shown = []
    for start in starts if isinstance(starts, list) else ():
        if isinstance(start, dict):
            command, packages = start.get("command"), start.get("packages")
            shown.append(
                {
                    **{name: str(start.get(name) or "") for name in ("time", "host", "git", "python")},
                    "command": list(map(str, command)) if isinstance(command, list) else [],
                    "packages": packages if isinstance(packages, dict) else {},
                }
            )
    return shown


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the numbers at the top."""
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
            tiles.append(("images per second", f"{rates[len(rates) // 2]:,.4g}", "median"))
    for best in best_by_score(facts.evaluations):
        value, _ = FID.formatted(best.fid)
        remark = f"step {best.step:,}, {best.nfe} NFE, {describe_basis(best)}" if best.step is not None else ""
        tiles.append((f"best {best.score_name}", value, remark))
    return tiles


def _grids(facts: RunFacts) -> tuple[list[dict[str, Any]], list[str]]:
    """Sample grids at even distances over the run, including the first and the last; and a line per damaged one."""
    count = len(facts.grids)
    chosen = sorted({round(i * (count - 1) / (_MAX_GRIDS - 1)) for i in range(_MAX_GRIDS)}) if count else []
    shown, damaged = [], []
    for step, path in (facts.grids[i] for i in chosen):
        try:
            shown.append({"step": step, "source": _inlined(path)})
        except (BadImage, OSError, UserError) as error:
            damaged.append(f"{path.name}: the grid of samples can't be read ({error})")
    return shown, damaged


def _inlined(path: Path) -> str:
    """A PNG file as a data URL; large images are scaled down. Raises BadImage if it is damaged."""
    data = read_regular(path)
    shown = Image.fromarray(decode_picture(data, exif="ignore", formats=("PNG",)).pixels)
    if max(shown.size) <= _MAX_IMAGE:
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"
    shown.thumbnail((_MAX_IMAGE, _MAX_IMAGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _training(facts: RunFacts) -> list[tuple[str, str]]:
    """(title, svg) of every quantity that was logged."""
    panels = [
        ("Loss", "loss", True, True),
        ("Learning rate", "lr", False, False),
        ("Discretisation N(k)", "num_scales", False, False),
        ("Target network's EMA μ(k)", "target_ema", False, False),
        ("Gradient norm", "grad_norm", True, True),
        ("Consistency error", "consistency_error", True, False),
        ("Images per second", "images_per_second", False, True),
    ]
    found = []
    for title, key, log, smooth in panels:
        points = [(record["step"], record[key]) for record in facts.metrics if _is_number(record.get(key))]
        if points:
            x, y = zip(*points, strict=True)
            found.append((title, training_curve(x, y, name=title, log=log, smooth=smooth)))
    return found + _by_noise(facts) + _consistency(facts)


def _by_noise(facts: RunFacts) -> list[tuple[str, str]]:
    """(title, svg) of what was logged by quartile of the noise."""
    panels = [
        ("Loss by quartile of the noise", "loss", True),
        ("Norm of the tangent g by quartile of the noise", "tangent_norm", True),
        ("Learned weighting w(t) by quartile of the noise", "weighting", False),
    ]
    labels = {1: "1, least noise", 2: "2", 3: "3", 4: "4, most noise"}
    found = []
    for title, key, log in panels:
        curves = []
        for quartile, label in labels.items():
            name = f"{key}_q{quartile}"
            points = [(record["step"], record[name]) for record in facts.metrics if _is_number(record.get(name))]
            if points:
                x, y = zip(*points, strict=True)
                curves.append(Curve(label, x, y))
        if curves:
            found.append((title, training_curves(curves, name=title, log=log)))
    return found


def _consistency(facts: RunFacts) -> list[tuple[str, str]]:
    """(title, svg) of the consistency error against time at the newest step, over the most images."""
    if not facts.consistency:
        return []
    last = facts.consistency[-1]
    curves = [
        Curve("to the next time", last["times"][1:], last["neighbours"]),
        Curve("to the one-step sample", last["times"][1:], last["to_start"][1:]),
    ]
    title = f"Consistency error against time, step {last['step']:,}, {last['weights']}, {last['num_samples']} images"
    return [(title, time_curve(curves, name=title, y_label="difference of f"))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _table(shown: Sequence[tuple[RunFacts, EvaluationResult]], metrics: Sequence[MetricDefinition]) -> dict[str, Any]:
    """The results over one network's features, whose metrics have names of their own."""
    results = [each for _, each in shown]
    score_name, references = results[0].score_name, reference_names(results)
    return {
        "score_name": score_name,
        "columns": [
            (metric.title_over(score_name), metric.name)
            for metric in metrics
            if metric.name != FID.name and any(metric.name in each.metrics for each in results)
        ],
        "references": list(dict.fromkeys(references)),
        "features": results[0].features,
        "rows": [
            _row(each, owner, reference, metrics) for (owner, each), reference in zip(shown, references, strict=True)
        ],
    }


def _row(
    result: EvaluationResult, owner: RunFacts, reference: str, metrics: Sequence[MetricDefinition]
) -> dict[str, Any]:
    return {
        "result": result,
        "run": owner.name,
        "times": ", ".join(f"{time:.4g}" for time in result.times or ()),
        "reference": reference,
        "score": FID.formatted(result.fid),
        "cells": {
            metric.name: metric.formatted(result.metrics[metric.name])
            for metric in metrics
            if metric.name in result.metrics
        },
    }


def _warnings(runs: list[RunFacts]) -> list[str]:
    """One line per distinct warning, with the evaluations that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for owner in runs:
        for each in owner.evaluations:
            for warning in each.warnings:
                name = "existing images" if each.step is None else f"step {each.step} {each.weights} NFE {each.nfe}"
                found.setdefault(warning, {}).setdefault(owner.name, []).append(name)
    total = sum(len(owner.evaluations) for owner in runs)
    lines = []
    for warning, owners in found.items():
        which = "; ".join(f"{name}, {', '.join(dict.fromkeys(evaluations))}" for name, evaluations in owners.items())
        count = sum(map(len, owners.values()))
        lines.append(f"{warning} ({f'all {total} evaluations' if count == total > 1 else which})")
    return lines + [line for owner in runs for line in owner.unreadable]


def _events(facts: RunFacts) -> list[dict[str, Any]]:
    """The newest events, in order; the keys that not every event has become `details`."""
    shown = []
    for event in facts.events[-_MAX_EVENTS:]:
        more = {key: value for key, value in event.items() if key not in ("time", "event", "step", "rank", "why")}
        details = ", ".join(f"{key} {value}" for key, value in more.items())
        shown.append({**event, "at": _time(event.get("time")), "details": details})
    return shown


def _timeline(facts: RunFacts) -> list[tuple[float, str, str]]:
    """(percent of the run's time, event, label) of every event."""
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
