"""Commands that show runs: `runs`, `compare`, `report`, `mirror`."""

import contextlib
import dataclasses
import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.table import Table

from cmscale.cli.command import TableConsole, command
from cmscale.cli.configs import print_differences
from cmscale.cli.options import JsonOption
from cmscale.commands.parser import Output
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
_LEAST_BARS, _MOST_BARS, _BESIDE_BARS = 10, 40, 45
_WIDE = 180  # columns of a terminal that has room for all facts in a row


@command(app)
def report(
    run: Annotated[Place, typer.Argument(help="The run's folder."), USED],
    beside: Annotated[
        list[Place] | None, typer.Option(metavar="RUN", help="Another run to show too; may be repeated."), USED
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page in place of writing it, renewed while the run lives."), USED
    ] = False,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where to serve. Elsewhere than on the loopback others can read it."),
        Use(needs=("serve",)),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where to serve; 0: a free port."), Use(needs=("serve",))
    ] = 0,
) -> None:
    """Builds the page report/index.html of a run, or serves it until Ctrl-C."""
    from cmscale.runs.folder import RunDir

    shown, *others = [RunDir(place.local("a run that is shown")) for place in (run, *(beside or []))]
    for each in (shown, *others):
        if not each.config.is_file():
            raise UserError(f"{each.root}: not a run (no config.yaml)")
    if serve:
        from cmscale.report import serve as serving

        serving.serve(shown, siblings=others, host=host, port=port)
        return
    from cmscale.report import build_report

    print(build_report(shown, siblings=others))


@command(app)
def mirror(
    run: Annotated[Place, typer.Argument(help="The run's folder."), USED],
    as_json: JsonOption = False,
) -> None:
    """Sends what wandb, TensorBoard and Prometheus lack of a run: scores measured after its end, what had failed.

    Its config says where to; mirrors that have all get nothing twice. While a run trains it does so itself.
    """
    from cmscale.config import read_config
    from cmscale.io.packages import require
    from cmscale.runs.folder import RunDir
    from cmscale.runs.log import read_lines
    from cmscale.runs.standing import how_it_stands

    folder = RunDir(run.local("a run that is sent"))
    if not folder.config.is_file():
        raise UserError(f"{run}: not a run (no config.yaml)")
    config = read_config(folder.config, resolved=True)
    if config.tensorboard.enabled:
        require("tensorboard", key="tensorboard.enabled")
    try:
        events = list(read_lines(folder.events))
    except OSError as error:  # its launcher, Slurm and the times of its files still say whether it runs
        events = []
        print(f"{folder.events}: can't be read ({error.strerror}); the rest is sent", file=sys.stderr)
    state, known_by = how_it_stands(folder, events)
    if state == "running":
        raise UserError(f"{run}: is running ({known_by}), and sends by itself")
    from cmscale.training.metrics_log import send
    from cmscale.training.wandb_mirror import is_disabled, unsynced

    with contextlib.redirect_stdout(sys.stderr):  # what mirrors say of failures
        outcome = send(folder, config)
    has_all = dict.fromkeys(outcome, "has all")
    if "wandb" in outcome and is_disabled(config.wandb):
        has_all["wandb"] = "disabled by WANDB_MODE or wandb's settings; nothing is sent"
    waiting = unsynced(folder) if "wandb" in outcome else []
    if as_json:
        facts = {name: {"failure": why or None, "state": why or has_all[name]} for name, why in outcome.items()}
        print(json.dumps({"mirrors": facts, "unsynced": [str(each) for each in waiting]}, indent=1))
    else:
        for name, failure in outcome.items():
            print(f"{name}: {failure or has_all[name]}")
        if waiting:
            folders = f"{shlex.quote(str(folder.root / 'wandb'))}/offline-run-*"
            print(f"wandb: {len(waiting)} offline; `wandb sync {folders}` sends it")
        if not outcome:
            print("no mirror: wandb.mode is off, tensorboard.enabled and prometheus.enabled are false")
    if any(outcome.values()):
        raise typer.Exit(1)


@command(app)
def runs(
    runs_dir: Annotated[Place, typer.Argument(help="The folder that holds runs."), USED] = Place("runs"),  # noqa: B008
    as_json: JsonOption = False,
    watch: Annotated[
        float | None,
        typer.Option(min=1, metavar="SECONDS", help="Print again every so many seconds, until Ctrl-C."),
        Use(excludes=("as_json",)),
    ] = None,
) -> None:
    """Lists runs: state and how it is known, age, step, rate, time left, loss, best score.

    The score is the lowest Fréchet distance of the evaluations with the most samples. It says what it was measured on.
    """
    folder = runs_dir.local("the folder of runs")
    if not folder.is_dir():
        raise UserError(f"{runs_dir}: no such folder")
    if (folder / "config.yaml").is_file():
        raise UserError(f"{runs_dir}: is a run; give the folder that holds runs")
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in _overviews(folder)], indent=1))
        return
    console = TableConsole()
    if watch is None:
        _print_runs(_overviews(folder), console)
        return
    while True:
        found = _overviews(folder)
        console.clear()  # on a terminal; elsewhere one table follows the other
        console.print(f"{datetime.now():%Y-%m-%d %H:%M:%S}, {folder}, every {watch:g} s")
        _print_runs(found, console)
        sys.stdout.flush()
        time.sleep(watch)


def _overviews(folder: Path) -> list[Any]:
    from cmscale.runs.overview import overview, runs_in
    from cmscale.runs.standing import ask_slurm_at_once

    found = runs_in(folder)
    states_of = ask_slurm_at_once(found)
    shown = counted(found, f"reading {folder}", total=len(found), unit="runs")
    return [overview(run, states_of=states_of) for run in shown]


def _print_runs(found: Sequence[Any], console: TableConsole) -> None:
    """Prints a row for each run; where that has no room, what is long in a line below, or a few lines for each run."""
    rows = [_facts(each) for each in found]
    if console.width >= _WIDE:
        console.print(_table([_FACTS, *(tuple(facts.values()) for facts in rows)]))
        return
    names = [name for name in _FACTS if name not in _LONG]
    shown = [names, *([facts[name] for name in names] for facts in rows)]
    fits = _width_of(shown) <= console.width
    if fits:
        console.print(_table(shown))
    for facts in rows:
        said = [facts["known by"], facts["best score"], f"branch of {facts['branch of']}" if facts["branch of"] else ""]
        if not fits:
            said = [_in_a_line(facts), *said]
        console.print(f"{facts['run']}: {'; '.join(filter(None, said))}")


def _in_a_line(facts: dict[str, str]) -> str:
    """The short facts of a run, for a terminal without room for a row."""
    step = f"step {facts['step']} of {facts['of']}"
    left = f"{facts['left']} left" if facts["left"] else ""
    age = f"{facts['age']} old" if facts["age"] else ""
    loss = f"loss {facts['loss']}" if facts["loss"] else ""
    return ", ".join(filter(None, [facts["method"], facts["state"], age, step, facts["rate"], left, loss]))


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*rows[0], box=None)
    for row in rows[1:]:
        table.add_row(*row)
    return table


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


@command(app)
def compare(
    runs: Annotated[list[Place], typer.Argument(metavar="RUN...", help="Two or more runs."), USED],
    out: Annotated[
        Place | None,
        typer.Option(metavar="FILE.html", help="Write a page with curves in place of the tables."),
        Use(excludes=("as_json",)),
        Output((".html",)),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compares runs: scores, curves, and the differences of their configs by effect on the losses."""
    from cmscale.runs.folder import RunDir

    if len(runs) < 2:
        raise UserError(f"{runs[0]}: is one run; give two or more to compare")
    folders = [RunDir(place.local("a run that is compared")) for place in runs]
    seen: dict[Path, Place] = {}
    for each, place in zip(folders, runs, strict=True):
        if not each.config.is_file():
            raise UserError(f"{each.root}: not a run (no config.yaml)")
        if (first := seen.setdefault(each.root.resolve(), place)) is not place:
            raise UserError(f"{place}: is the same run as {first}; name each run once")
    from cmscale.report import comparison

    found = comparison.compare_runs(folders)
    for line in found.unreadable:
        print(f"note: not compared: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps(comparison.as_json(found), indent=1))
    elif out is not None:
        out.write(comparison.page(found))
        print(out)
    else:
        _print_comparison(found)


def _signs_of(encoding: str | None) -> str:
    """The bars that an encoding has; without one, as in memory, every text is kept."""
    from cmscale.report.comparison import BARS, PLAIN_BARS

    try:
        BARS.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return PLAIN_BARS
    return BARS


def _print_scores(basis: str, scores: Sequence[Any], console: TableConsole) -> None:
    """Prints the results that may be compared with each other: a row for each, or a column if that is too wide.

    Where neither has room, the rows have the score alone.
    """
    titles = {name: title for score in scores for name, title in score.titles.items()}
    rows = [("", *(score.run for score in scores))]
    rows.append(("step", *(str(score.step) for score in scores)))
    rows.append(("weights", *(score.weights for score in scores)))
    rows.append(("NFE", *(str(score.nfe) for score in scores)))
    for name in ("fid", *(name for name in titles if name != "fid")):
        values = (f"{score.metrics[name]:.4g}" if name in score.metrics else "" for score in scores)
        rows.append((scores[0].name if name == "fid" else titles[name], *values))
    console.print(f"\n{basis}")
    across, of_score = list(zip(*rows, strict=True)), list(zip(*rows[:5], strict=True))
    shown = next((each for each in (across, rows) if _width_of(each) <= console.width), of_score)
    if _width_of(shown) <= console.width:
        console.print(_table(shown))
    else:
        for run, step, weights, nfe, value in of_score[1:]:
            console.print(f"{run}: {value} (step {step}, {weights}, {nfe} NFE)")
    if shown is of_score and len(rows) > 5:
        console.print("the other metrics: a wider terminal, --json, or --out FILE.html")


def _width_of(rows: Sequence[Sequence[str]]) -> int:
    """The columns of a terminal that a table takes."""
    return sum(max(map(cell_len, column)) + 2 for column in zip(*rows, strict=True))


def _print_comparison(found: Any) -> None:
    from cmscale.report import comparison

    console = TableConsole()
    for basis, scores in itertools.groupby(found.scores, key=lambda score: score.basis):
        _print_scores(basis, list(scores), console)
    table = Table("curve", "run", "", "first", "last", box=None)
    signs = _signs_of(sys.stdout.encoding)
    room = console.width - max(map(len, found.names)) - _BESIDE_BARS
    for row in comparison.curve_rows(found, signs=signs, width=min(max(room, _LEAST_BARS), _MOST_BARS)):
        table.add_row(*row)
    console.print()
    console.print(table)
    if found.differences:
        console.print()
    print_differences(found.differences, names=found.names)
