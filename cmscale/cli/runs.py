"""Commands that show runs: `report`, `runs`."""

import sys
from typing import Annotated

import typer
from rich.table import Table

from cmscale.cli.command import TableConsole, command
from cmscale.commands.use import USED
from cmscale.errors import UserError
from cmscale.io.place import Place

app = typer.Typer()


@command(app)
def report(
    run: Annotated[Place, typer.Argument(help="The run's folder."), USED],
    beside: Annotated[list[Place] | None, typer.Option(help="Another run to show too; may be repeated."), USED] = None,
) -> None:
    """Builds the page report/index.html of a run."""
    from cmscale.report import build_report
    from cmscale.runs.folder import RunDir

    shown, *others = [RunDir(place.local("a run that is shown")) for place in (run, *(beside or []))]
    for each in (shown, *others):
        if not each.config.is_file():
            raise UserError(f"{each.root}: not a run (no config.yaml)")
    print(build_report(shown, siblings=others))


@command(app)
def runs(
    runs_dir: Annotated[Place, typer.Argument(help="The folder that holds runs."), USED] = Place("runs"),  # noqa: B008
) -> None:
    """Lists runs with method, step, loss, best score and last event.

    The score is the lowest Fréchet distance of the evaluations with the most samples. It says what it was measured on.
    """
    from cmscale.config import read_config
    from cmscale.runs.comparison import best_of, describe_basis
    from cmscale.runs.folder import RunDir
    from cmscale.runs.log import latest_metrics, read_lines, state_of
    from cmscale.runs.results import read_evaluations

    folder = runs_dir.local("the folder of runs")
    if not folder.is_dir():
        raise UserError(f"{runs_dir}: no such folder")
    table = Table("run", "method", "step", "of", "loss", "best score", "last event", box=None)
    for path in sorted(child.parent for child in folder.glob("*/config.yaml")):
        run = RunDir(path)
        try:
            config = read_config(run.config)
        except UserError as error:
            table.add_row(run.name, "?", "", "", "", "", str(error))
            continue
        metrics = latest_metrics(run)
        last = metrics[-1] if metrics else {"step": 0, "loss": float("nan")}
        evaluations, unreadable = read_evaluations(run)
        sampled = [each for each in evaluations if each.step is not None]
        score = f"{len(unreadable)} unreadable files; " if unreadable else ""
        if sampled:
            best = best_of(sampled)
            measured = f"step {best.step}, {best.nfe} NFE, {describe_basis(best)}"
            score += f"{best.score_name} {best.fid.mean:.2f} ({measured})"
        table.add_row(
            run.name,
            config.method.kind,
            str(last["step"]),
            str(config.train.total_steps),
            f"{last['loss']:.4g}",
            score,
            state_of(read_lines(run.events)),
        )
    TableConsole(width=None if sys.stdout.isatty() else 200).print(table)
