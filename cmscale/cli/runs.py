"""The command that lists runs: `runs`."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len

from cmscale.cli.command import TableConsole, command
from cmscale.cli.json_output import print_json
from cmscale.cli.options import JsonOption
from cmscale.cli.tables import table_of, width_of
from cmscale.commands.use import USED, Use
from cmscale.errors import UserError, printable
from cmscale.io.counting import counted, in_words
from cmscale.io.place import Place

app = typer.Typer()
_FACTS = (
    "run",
    "method",
    "state",
    "known by",
    "age",
    "step",
    "of",
    "rate",
    "left",
    "loss",
    "best score",
    "branch of",
)
_LONG = ("known by", "best score", "branch of")
_ROOM_OF_LONG = 60  # columns that they need beside the others, or they are in a line below


@command(app)
def runs(
    runs_dir: Annotated[
        Place | None, typer.Argument(help="The folder that holds runs. Default: the site's, or ./runs."), USED
    ] = None,
    as_json: JsonOption = False,
    watch: Annotated[
        float | None,
        typer.Option(min=1, max=86400, metavar="SECONDS", help="Print again every so many seconds, until Ctrl-C."),
        Use(excludes=("as_json",)),
    ] = None,
) -> None:
    """Lists runs: state and how it is known, age, step, rate, time left, loss, best score.

    The score is the lowest Fréchet distance of the evaluations with the most samples. It says what it was measured on.
    """
    from cmscale.config.site import read_site

    runs_dir = runs_dir or read_site().runs_dir
    folder = runs_dir.local("the folder of runs")
    if not folder.is_dir():
        raise UserError(f"{runs_dir}: no such folder")
    if (folder / "config.yaml").is_file():
        raise UserError(f"{runs_dir}: is a run; give the folder that holds runs")
    found = _overviews(folder)
    if not found:
        print(f"{folder}: holds no runs", file=sys.stderr)
    if as_json:
        facts = (dataclasses.asdict(each) for each in found)
        print_json([{"run": each["name"], **each} for each in facts])  # as `compare` calls it
        return
    console = TableConsole()
    if watch is None:
        _print_runs(found, console)
        return
    while True:
        console.clear()  # on a terminal; elsewhere one table follows the other
        console.print(f"{datetime.now():%Y-%m-%d %H:%M:%S}, {folder}, every {watch:g} s")
        _print_runs(found, console)
        sys.stdout.flush()
        time.sleep(watch)
        found = _overviews(folder)


def _overviews(folder: Path) -> list[Any]:
    from cmscale.runs.overview import overview, runs_in
    from cmscale.runs.standing import ask_slurm_at_once

    found = runs_in(folder)
    states_of = ask_slurm_at_once(found)
    shown = counted(found, f"reading {folder}", total=len(found), unit="runs")
    return [overview(run, states_of=states_of) for run in shown]


def _print_runs(found: Sequence[Any], console: TableConsole) -> None:
    """Prints a row for each run; where that has no room, what is long in a line below.

    A run whose name leaves no room for its row has a few lines in its place, and the others keep theirs.
    """
    if not found:
        return
    rows = [_facts(each) for each in found]
    names = [name for name in _FACTS if name not in _LONG]
    shown = [names, *([facts[name] for name in names] for facts in rows)]
    if console.width >= width_of(shown) + _ROOM_OF_LONG:
        console.print(table_of([_FACTS, *(tuple(facts.values()) for facts in rows)]))
        return
    room = console.width - width_of([("", *row[1:]) for row in shown])
    fitting = [row for row in shown if cell_len(row[0]) <= room]
    if len(fitting) > 1:
        console.print(table_of(fitting))
    for facts in rows:
        said = [facts["known by"], facts["best score"], f"branch of {facts['branch of']}" if facts["branch of"] else ""]
        if cell_len(facts["run"]) > room:
            said = [_in_a_line(facts), *said]
        console.print(f"{facts['run']}: {'; '.join(filter(None, said))}")


def _in_a_line(facts: dict[str, str]) -> str:
    """The short facts of a run, for a terminal without room for a row."""
    step = f"step {facts['step']} of {facts['of']}"
    left = f"{facts['left']} left" if facts["left"] else ""
    age = f"{facts['age']} old" if facts["age"] else ""
    loss = f"loss {facts['loss']}" if facts["loss"] else ""
    return ", ".join(filter(None, [facts["method"], facts["state"], age, step, facts["rate"], left, loss]))


def _facts(found: Any) -> dict[str, str]:
    score = ""
    if found.best is not None:
        best = found.best
        score = f"{best.name} {best.value:.2f} (step {best.step}, {best.nfe} NFE, {best.basis})"
    problems = f"{len(found.problems)} unreadable: {found.problems[0]}" if found.problems else ""
    rate = f"{found.images_per_second:.4g} images/s" if found.images_per_second else ""
    values = (
        printable(found.name),
        found.method or "?",
        found.state,
        found.known_by,
        "" if found.age_seconds is None else in_words(found.age_seconds),
        str(found.step),
        "?" if found.total_steps is None else str(found.total_steps),
        rate if found.state == "running" else "",
        "" if found.eta_seconds is None else in_words(found.eta_seconds),
        "" if found.loss is None else f"{found.loss:.4g}",
        "; ".join(filter(None, [score, problems])),
        found.branch_of or "",
    )
    return dict(zip(_FACTS, values, strict=True))
