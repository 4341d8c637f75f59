"""Commands on a run: `report`, `mirror`."""

import contextlib
import shlex
import sys
from typing import Annotated

import typer

from cmscale.cli.command import command
from cmscale.cli.json_output import print_json
from cmscale.cli.options import JsonOption
from cmscale.commands.use import USED, Use
from cmscale.errors import UserError
from cmscale.io.place import Place

app = typer.Typer()


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
    from cmscale.cli.several_runs import runs_at

    shown, *others = runs_at([run, *(beside or [])], "a run that is shown")
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
    from cmscale.runs.meant import no_run
    from cmscale.runs.standing import how_it_stands

    folder = RunDir(run.local("a run that is sent"))
    if not folder.config.is_file():
        raise no_run(folder.root)
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
    from cmscale.training.wandb_mirror import disabled_by, unsynced

    with contextlib.redirect_stdout(sys.stderr):  # what mirrors say of failures
        outcome = send(folder, config)
    has_all = dict.fromkeys(outcome, "has all")
    if "wandb" in outcome and (where := disabled_by(config.wandb)):
        has_all["wandb"] = f"disabled by {where}; nothing is sent"
    waiting = unsynced(folder) if "wandb" in outcome else []
    if as_json:
        facts = {name: {"failure": why or None, "state": why or has_all[name]} for name, why in outcome.items()}
        print_json({"mirrors": facts, "unsynced": [str(each) for each in waiting]})
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
