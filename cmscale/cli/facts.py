"""Commands that print facts: `doctor`, `estimate`, `schema`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer()
console = Console(stderr=True)


@app.command()
def doctor() -> None:
    """Lists what this machine offers: packages, devices, attention kernels, Slurm, S3."""
    from cmscale.cli.doctor import findings

    table = Table("what", "found", box=None)
    for what, found in findings():
        table.add_row(what, found)
    Console().print(table)


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(help="A config file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    tflops: Annotated[float, typer.Option(help="TFLOP/s that one GPU sustains on this network.")] = 150.0,
) -> None:
    """Estimates the cost of a config: parameters, memory per rank, FLOP, days."""
    from cmscale.config import read_config
    from cmscale.config.cautions import cautions
    from cmscale.training.estimate import estimates

    table = Table("what", "estimate", box=None)
    settings = read_config(config, overrides)
    for what, value in estimates(settings, num_ranks=nodes * gpus_per_node, tflops=tflops):
        table.add_row(what, value)
    Console().print(table)
    for caution in cautions(settings):
        console.print(f"caution: {caution}", markup=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Prints the JSON Schema of a config file, for editors."""
    from cmscale.config import json_schema

    print(json.dumps(json_schema(), indent=1))
