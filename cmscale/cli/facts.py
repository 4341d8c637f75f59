"""Commands that print facts: `doctor`, `estimate`."""

import json
import math
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cmscale.cli.command import TableConsole, command
from cmscale.cli.options import JsonOption
from cmscale.commands.use import USED
from cmscale.errors import UserError
from cmscale.io.place import Place

app = typer.Typer()
console = Console(stderr=True)


@command(app)
def doctor() -> None:
    """Lists what this machine offers: packages, devices, attention kernels, Slurm, S3."""
    from cmscale.cli.doctor import findings

    table = Table("what", "found", box=None)
    for what, found in findings():
        table.add_row(what, found)
    TableConsole().print(table)


@command(app)
def estimate(
    config: Annotated[Place, typer.Argument(help="A config file."), USED],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]..."), USED] = None,
    nodes: Annotated[int, typer.Option(min=1), USED] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1), USED] = 8,
    tflops: Annotated[float, typer.Option(help="TFLOP/s that one GPU sustains on this network."), USED] = 150.0,
    as_json: JsonOption = False,
) -> None:
    """Estimates the cost of a config: parameters, memory per rank, FLOP, days."""
    from cmscale.config import read_config
    from cmscale.config.cautions import cautions

    if not 0 < tflops < math.inf:
        raise UserError(f"--tflops {tflops}: give a number above 0")
    settings = read_config(config, overrides)
    from cmscale.training.estimate import estimates

    found = list(estimates(settings, num_ranks=nodes * gpus_per_node, tflops=tflops))
    if as_json:
        print(json.dumps({**dict(found), "cautions": cautions(settings)}, indent=1))
        return
    table = Table("what", "estimate", box=None)
    for what, value in found:
        table.add_row(what, value)
    TableConsole().print(table)
    for caution in cautions(settings):
        console.print(f"caution: {caution}", markup=False, soft_wrap=True)
