"""Commands that print facts: `doctor`, `estimate`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cmscale.cli.command import TableConsole, command
from cmscale.cli.json_output import print_json
from cmscale.cli.options import JsonOption
from cmscale.commands.use import USED, Use
from cmscale.errors import UserError
from cmscale.io.place import Place

if TYPE_CHECKING:
    from cmscale.training.estimate.tables import Table as TextTable

app = typer.Typer()
_LEAST, _MOST = 1e-9, 1e9  # of what is estimated with: quotients of them are numbers
console = Console(stderr=True)


@command(app)
def doctor(
    place: Annotated[
        Place | None,
        typer.Argument(
            help="A folder or s3://BUCKET/PREFIX to try: a small object is written, read, written conditionally and "
            "deleted. Default: the site's checkpoint.export_to."
        ),
        USED,
    ] = None,
    runs_dir: Annotated[
        Place | None,
        typer.Option(help="The folder of runs, whose room and locks are tried. Default: the site's, or ./runs."),
        USED,
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Try as many nodes of a Slurm job, and show in what they differ."),
        Use(excludes=("of_node",)),
    ] = None,
    as_json: JsonOption = False,
    of_node: Annotated[bool, typer.Option("--of-node", hidden=True), Use(excludes=("as_json",))] = False,
    sign: Annotated[Place | None, typer.Option(hidden=True), Use(needs=("of_node",))] = None,
) -> None:
    """Tries what this machine offers: GPUs, attention, gloo, NCCL, disks, locks, Slurm, S3, wandb, weight files.

    Exits with 1 if something fails; each warning and failure says what to do.
    """
    from cmscale.cli import diagnosis
    from cmscale.config.site import read_site

    folder = (runs_dir or read_site().runs_dir).local("the folder of runs")
    if of_node:
        diagnosis.report_node([*diagnosis.found_here(place, folder, is_of_many=True), *diagnosis.shared(sign)])
        return
    if nodes is None:
        found = diagnosis.found_here(place, folder)
        has_failed = diagnosis.show(found, as_json=as_json)
    else:
        has_failed = diagnosis.show_nodes(nodes, place, folder, as_json=as_json)
    if has_failed:
        raise typer.Exit(1)


@command(app)
def estimate(
    config: Annotated[Place, typer.Argument(help="A config file."), USED],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]..."), USED] = None,
    nodes: Annotated[int, typer.Option(min=1), USED] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1), USED] = 8,
    gpu: Annotated[str, typer.Option(help="The kind of GPU, as in the table of micro-batches."), USED] = "h100-80g",
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that a GPU sustains on this network."), USED] = None,
    network: Annotated[float | None, typer.Option(help="GB/s that a GPU sends to others."), USED] = None,
    price: Annotated[float | None, typer.Option(help="Price of a GPU-hour."), USED] = None,
    images_per_core: Annotated[float, typer.Option(help="Images that a processor decodes per second."), USED] = 300.0,
    interruption_hours: Annotated[float, typer.Option(help="GPU-hours between two interruptions."), USED] = 50_000.0,
    save_seconds: Annotated[float | None, typer.Option(help="By which a checkpoint delays training."), USED] = None,
    restart_seconds: Annotated[float, typer.Option(help="From an interruption to the next step."), USED] = 300.0,
    as_json: JsonOption = False,
) -> None:
    """Estimates the cost of a config: memory, the largest micro-batch, time, price, goodput on 8 to 512 GPUs."""
    from cmscale.config import read_config
    from cmscale.config.cautions import cautions
    from cmscale.config.site import read_site
    from cmscale.training.estimate.gpus import GPUS

    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: is not known; choose one of {', '.join(GPUS)}")
    positive = {"--tflops": tflops, "--network": network, "--price": price, "--images-per-core": images_per_core}
    positive |= {"--interruption-hours": interruption_hours, "--save-seconds": save_seconds}
    positive |= {"--restart-seconds": restart_seconds}
    for flag, value in positive.items():
        if value is not None and not _LEAST <= value <= _MOST:
            raise UserError(f"{flag} {value}: give a number from {_LEAST:g} to {_MOST:g}")
    settings = read_config(config, overrides, beneath=[read_site().layer])  # as submit.py reads it
    from cmscale.training.estimate.request import Request
    from cmscale.training.estimate.tables import tables

    request = Request(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        tflops=tflops,
        network=network,
        price=price,
        images_per_core=images_per_core,
        interruption_hours=interruption_hours,
        save_seconds=save_seconds,
        restart_seconds=restart_seconds,
    )
    found = list(tables(settings, request))
    if as_json:
        document = {each.name: each.facts for each in found}
        print_json({**document, "cautions": cautions(settings)})
        return
    _show(found)
    for caution in cautions(settings):
        console.print(f"caution: {caution}", markup=False, soft_wrap=True)


def _show(tables: "list[TextTable]") -> None:
    """Prints tables below each other."""
    shown = TableConsole()
    for number, table in enumerate(tables):
        drawn = Table(*table.columns, box=None, title=table.title, title_justify="left")
        for row in table.rows:
            drawn.add_row(*row)
        if number:
            shown.print()
        shown.print(drawn)
