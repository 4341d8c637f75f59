"""Commands on weights and checkpoints: `export`, `import`, `verify`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cmscale.cli.options import (
    ConfigOption,
    OverridesArgument,
    StepOption,
    WeightsOption,
)
from cmscale.errors import UserError

app = typer.Typer()
console = Console(stderr=True)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, a checkpoint, exported weights or an OpenAI .pt.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="Path or s3:// URL of the file (diffusers: of the folder). Without it, a run's checkpoints that its "
            "checkpoint.export_to lacks are uploaded."
        ),
    ] = None,
    format: Annotated[Literal["safetensors", "openai", "diffusers"], typer.Option()] = "safetensors",
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
) -> None:
    """Writes weights in a format of another project, or uploads the checkpoints that a run has not exported yet."""
    from cmscale.export.weights import export_weights, finish_copies
    from cmscale.source import checkpoint_step, load_source

    if to is None:
        for copied in finish_copies(Path(source)):
            print(f"step {copied}: uploaded")
        return
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides or [])
    with console.status(f"writing {to}"):
        export_weights(loaded, format=format, to=to)
    print(to)


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="OpenAI's .pt, NVlabs' .pkl, a diffusers folder, or safetensors.")
    ],
    to: Annotated[str, typer.Option(help="Path or s3:// URL of the .safetensors file to write.")],
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
) -> None:
    """Converts weights of other projects to safetensors that contain their config. Names must match exactly."""
    export(source, to=to, format="safetensors", config=config, overrides=overrides)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or a checkpoint; a local path or s3://.")],
) -> None:
    """Checks all files of all checkpoints against their manifests, without a GPU. Exits with 1 if one is damaged."""
    from cmscale.engine.checkpoint_reader import is_sealed, list_checkpoints, verify_checkpoint
    from cmscale.engine.manifest_checks import NOT_SEALED
    from cmscale.io.storage import open_storage
    from cmscale.runs.folder import CHECKPOINT_MANIFEST, step_name

    if open_storage(run).read_if_present(CHECKPOINT_MANIFEST) is not None:
        found = {run: run}
    else:
        found = {step_name(listed.step): listed.url for listed in list_checkpoints(run)}
    if not found:
        raise UserError(f"{run}: holds no checkpoint; give a run or a checkpoint folder")
    bad = 0
    for name, checkpoint in found.items():
        problems = verify_checkpoint(checkpoint)
        bad += bool(problems)
        notice = "" if problems or is_sealed(checkpoint) else f" ({NOT_SEALED})"
        print(f"{name}: {'; '.join(problems) if problems else 'good'}{notice}")
    if bad:
        raise typer.Exit(1)
