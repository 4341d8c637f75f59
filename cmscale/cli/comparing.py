"""The command that compares runs: `compare`."""

import itertools
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from cmscale.cli.command import TableConsole, command
from cmscale.cli.configs import print_differences
from cmscale.cli.json_output import print_json
from cmscale.cli.options import JsonOption
from cmscale.cli.tables import table_of, width_of
from cmscale.commands.parser import Output
from cmscale.commands.use import USED, Use
from cmscale.errors import UserError
from cmscale.io.place import Place

app = typer.Typer()
_LEAST_BARS, _MOST_BARS, _BESIDE_BARS = 10, 40, 45


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
    from cmscale.cli.several_runs import runs_at

    if len(runs) < 2:
        raise UserError(f"{runs[0]}: is one run; give two or more to compare")
    folders = runs_at(runs, "a run that is compared")
    from cmscale.report import comparison

    found = comparison.compare_runs(folders)
    for line in found.unreadable:
        print(f"note: not compared: {line}", file=sys.stderr)
    if as_json:
        print_json(comparison.as_json(found))
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
    shown = next((each for each in (across, rows) if width_of(each) <= console.width), of_score)
    if width_of(shown) <= console.width:
        console.print(table_of(shown))
    else:
        for run, step, weights, nfe, value in of_score[1:]:
            console.print(f"{run}: {value} (step {step}, {weights}, {nfe} NFE)")
    if shown is of_score and len(rows) > 5:
        console.print("the other metrics: a wider terminal, --json, or --out FILE.html")


def _print_comparison(found: Any) -> None:
    from cmscale.report import comparison

    console = TableConsole()
    for basis, scores in itertools.groupby(found.scores, key=lambda score: score.basis):
        _print_scores(basis, list(scores), console)
    table = Table("curve", "run", f"by {comparison.axis_of(found)}", "first", "last", box=None)
    signs = _signs_of(sys.stdout.encoding)
    room = console.width - max(map(len, found.names)) - _BESIDE_BARS
    for row in comparison.curve_rows(found, signs=signs, width=min(max(room, _LEAST_BARS), _MOST_BARS)):
        table.add_row(*row)
    console.print()
    console.print(table)
    if found.differences:
        console.print()
    print_differences(found.differences, names=found.names)
