"""Assembles report/index.html, one self-contained page, from a run's facts and plots."""

import base64
import csv
import datetime
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from cmscale.config.keys import written
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.io.json_text import parse_json
from cmscale.report import evaluations
from cmscale.report.curves import Panel, training_panels
from cmscale.report.facts import RunFacts, read_several
from cmscale.report.happened import grouped, time_text, timeline
from cmscale.report.numbers import last_sign, tiles
from cmscale.report.paper import PAPER
from cmscale.report.pictures import read_pictures
from cmscale.report.quality import quality_panels
from cmscale.report.settings import settings_of
from cmscale.report.templates import template
from cmscale.runs.comparison import RULE
from cmscale.runs.folder import RunDir

_MOST_STARTS = 50


def build_report(run: RunDir, *, siblings: Sequence[RunDir] = ()) -> Path:
    """Writes the page of a run and returns its path. What the run does not have yet is left out.

    Args:
        siblings: Other runs, such as a teacher, that tables and curves show for comparison.

    Raises:
        UserError: The run does not exist, or its folder may not be written.
    """
    page = render_report(run, siblings=siblings)
    try:
        replace_durably(run.report, page)
    except UserError as error:  # the folder of somebody else, or a full disk
        raise type(error)(f"{error}; --serve shows the page without writing it") from None
    return run.report


def render_report(run: RunDir, *, siblings: Sequence[RunDir] = (), version: str = "") -> bytes:
    """The page of a run, as HTML.

    Args:
        version: Of a page that is served: it asks its server now and then whether there is a newer one.

    Raises:
        UserError: The run does not exist.
    """
    facts, *others = read_several([run, *siblings])
    contents = {**_contents(facts, others), **_assets(), "version": version}
    page = template("page.html.j2").render(contents)
    return page.encode(errors="backslashreplace")  # paths that are not UTF-8


@functools.cache  # as the templates are: a served page has no program of a later release
def _assets() -> dict[str, Any]:
    """Style and program of the page; the hash lets no other program run in it."""
    style, script = (files("cmscale.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(style), "script": Markup(script), "script_hash": digest}


def _unreadable(runs: Sequence[RunFacts]) -> Iterator[str]:
    """What could not be read, with the name of its run where there are several."""
    for owner in runs:
        for line in filter(None, (owner.config_mistake, *owner.unreadable)):
            yield f"{owner.name}: {line}" if len(runs) > 1 else line


def _contents(facts: RunFacts, siblings: list[RunFacts]) -> dict[str, Any]:
    runs = [facts, *siblings]
    warned = evaluations.warnings(runs)
    tables = evaluations.tables(runs, notes=list(warned))
    pictures = read_pictures(facts)
    curves, constant = training_panels(runs)
    quality = [Panel(title, svg, basis) for title, basis, svg in quality_panels(runs)]
    state, known_by = facts.state()
    starts = _starts(facts)
    return {
        "facts": facts,
        "state": state,
        "known_by": known_by,
        "size": facts.setting("model.image_size"),
        "progress": min(1.0, facts.step / facts.total_steps) if facts.total_steps else None,
        "tiles": tiles(facts, state=state),
        "pictures": pictures,
        "curves": curves,
        "constant": constant,
        "tables": tables,
        "most_rows": evaluations.MOST_ROWS,
        "rule": RULE,
        "written": written,
        "several_runs": bool(siblings),
        "score_names": list(dict.fromkeys(table.score_name for table in tables)),
        "notes": list(warned.values()),
        "problems": [
            *_unreadable(runs),
            *pictures.damaged,
        ],
        "quality": quality,
        "paper": PAPER,
        "events": grouped(facts.events),
        "timeline": timeline(facts.events, last_sign=last_sign(facts)),
        "settings": settings_of(facts),
        "starts": starts[-_MOST_STARTS:],
        "earlier_starts": max(0, len(starts) - _MOST_STARTS),
        "links": _links(facts),
        "beside": [(each.name, _link(each.run.report, facts)) for each in siblings],
        "numbers": _numbers(facts, curves, tables),
        "made": time_text(datetime.datetime.now(datetime.UTC).timestamp()),
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


def _links(facts: RunFacts) -> list[tuple[str, str]]:
    """(name, URL) of the run's files that exist."""
    run = facts.run
    found = [(path.name, _link(path, facts)) for path in (run.config, run.metrics, run.events, run.provenance)]
    return [(name, link) for name, link in found if link]


def _link(path: Path, facts: RunFacts) -> str:
    """A URL relative to the page, empty if there is no such file."""
    return quote(os.fsencode(os.path.relpath(path, facts.run.report.parent))) if path.is_file() else ""


def _numbers(facts: RunFacts, curves: Sequence[Panel], tables: Sequence[evaluations.Table]) -> Markup:
    """What the page's buttons save, as JSON in a script element."""
    found = {
        "run": facts.name,
        "curves": {panel.title: _csv([panel.columns, *panel.rows]) for panel in curves if panel.columns},
        "evaluations": [
            {"run": row.run, **parse_json(row.result.to_bytes())} for table in tables for row in table.rows
        ],
        "table": _csv([_HEAD, *(line for table in tables for row in table.rows for line in _lines(row))]),
    }
    return Markup(json.dumps(found).replace("<", "\\u003c"))


_HEAD = ("run", "step", "weights", "nfe", "times", "samples", "seeds", "reference", "metric", "mean", "std")


def _lines(row: evaluations.Row) -> Iterator[tuple[Any, ...]]:
    """A line per metric of a result."""
    each = row.result
    what = (row.run, each.step, each.weights, each.nfe, row.times, each.num_samples, len(each.seeds), row.reference)
    for name, metric in each.metrics.items():
        yield *what, each.names.get(name, each.score_name if name == "fid" else name), metric.mean, metric.std


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([[_cell(value) for value in row] for row in rows])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
