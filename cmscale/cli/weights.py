"""Commands on weights and checkpoints: `export`, `import`, `ema`, `verify`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cmscale.cli.command import GIVEN, command
from cmscale.cli.json_output import print_json
from cmscale.cli.options import ConfigOption, JsonOption, OverridesArgument
from cmscale.commands.situation import DIFFUSERS, EXPORTED, RUN, WITH_WEIGHTS_TO_CHOOSE, overriding
from cmscale.commands.use import USED, Given, Use
from cmscale.errors import NotExported, UserError
from cmscale.export.target import check_license, check_target, copy_settings
from cmscale.io.place import Place

app = typer.Typer()
_TRIED_LENGTHS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25)


@command(app)
def export(
    source: Annotated[
        Place, typer.Argument(metavar="RUN", help="A run, a checkpoint, exported weights or an OpenAI .pt."), USED
    ],
    to: Annotated[
        Place | None,
        typer.Option(
            help="Path or s3:// URL of the file, or of a folder to publish (diffusers: always a folder; safetensors: a "
            "name without an ending). Without it, a run's checkpoints that its checkpoint.export_to lacks are uploaded."
        ),
        USED,
    ] = None,
    format: Annotated[
        Literal["safetensors", "openai", "diffusers"],
        typer.Option(help="Format of the weights."),
        Use(needs=("to",)),
    ] = "safetensors",
    weights: Annotated[
        str | None,
        typer.Option(help="An EMA's name, or `master`. Default: the config's first EMA."),
        Use(source=WITH_WEIGHTS_TO_CHOOSE, needs=("to",)),
    ] = None,
    step: Annotated[
        str,
        typer.Option("--checkpoint", metavar="STEP", help="Step of a run's checkpoint, or `latest`."),
        Use(source=(RUN,), needs=("to",)),
    ] = "latest",
    license: Annotated[
        str,
        typer.Option(metavar="ID", help="The licence in the model card, as Hugging Face's hub names it: apache-2.0."),
        Use(needs=("to",)),
    ] = "unknown",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    given: Given = GIVEN,
) -> None:
    """Writes weights in a format of another project, or uploads the checkpoints that a run has not exported yet."""
    given.refuse_unused(overriding=overriding(config, overrides or ()))
    if to is not None:
        if to.is_same(source):
            raise UserError(f"--to {to}: is the source itself; name another place")
        check_license(license)
        check_target(format, to)
    else:
        copy_settings(source.local("a run whose checkpoints are uploaded"))

    from cmscale.export.weights import export_weights
    from cmscale.source import checkpoint_step, load_source, model_kind

    given.refuse_unused(source=model_kind(source))
    if to is None:
        _upload_checkpoints(source.local("a run whose checkpoints are uploaded"))
        return
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides or [])
    cautions = export_weights(loaded, format=format, to=to, license=license)
    print(to)
    for caution in cautions:
        print(f"caution: {caution}", file=sys.stderr, flush=True)


def _upload_checkpoints(run: Path) -> None:
    """Uploads the checkpoints that a run has not exported yet; ends with status 1 if one is not."""
    from cmscale.export.weights import finish_copies

    try:
        finish_copies(run, lambda copied: print(f"step {copied}: uploaded", flush=True))
    except NotExported as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@command(app, "import")
def import_(
    source: Annotated[
        Place,
        typer.Argument(metavar="FILE", help="OpenAI's .pt, NVlabs' .pkl, a diffusers folder, or safetensors."),
        USED,
    ],
    to: Annotated[Place, typer.Option(help="Path or s3:// URL of the .safetensors file to write."), USED],
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    given: Given = GIVEN,
) -> None:
    """Converts weights of other projects to safetensors that contain their config. Names must match exactly."""
    export(source, to=to, format="safetensors", config=config, overrides=overrides, given=given)


@command(app)
def ema(
    run: Annotated[
        Place,
        typer.Argument(metavar="RUN", help="A run that was trained with ema.lengths; a local path or s3://."),
        USED,
    ],
    length: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the average relative to the length of training, such as 0.05."),
        USED,
    ] = None,
    to: Annotated[
        Place | None,
        typer.Option(help="Path or s3:// URL of the .safetensors file to write. Default: one in the run's exports/."),
        Use(needs=("length",)),
    ] = None,
    step: Annotated[
        str, typer.Option("--checkpoint", metavar="STEP", help="Step of a run's checkpoint, or `latest`."), USED
    ] = "latest",
    as_json: Annotated[bool, typer.Option("--json", help="List as JSON."), Use(excludes=("length",))] = False,
    given: Given = GIVEN,
) -> None:
    """Writes an average of a run's weights of any length, computed afterwards; without options lists what it keeps."""
    given.refuse_unused()
    if to is not None:
        check_target("safetensors", to)

    from cmscale.config.averages import power_name
    from cmscale.runs.choices import check_power_averages

    check_power_averages(run, step=step, length=length)

    from cmscale.engine.power_averages import error_of, kept_averages
    from cmscale.export.weights import export_weights
    from cmscale.io.storage import open_storage
    from cmscale.runs.folder import exported_weights
    from cmscale.source import checkpoint_step, load_source, newest_step

    at = checkpoint_step(step)
    at = newest_step(run) if at is None else at
    if length is None:
        kept = kept_averages(run, step=at)
        errors = {power_name(trial): error_of(kept, trial, step=at) for trial in _TRIED_LENGTHS}
        if as_json:
            listed = [{"step": each.profile.step, "name": each.name} for each in kept]
            print_json({"step": at, "kept": listed, "errors": errors})
            return
        for each in kept:
            print(f"step {each.profile.step}: {each.name}")
        for name, error in errors.items():
            print(f"{name} at step {at}: error {error:.2%}")
        return
    if to is None:
        to = Place(open_storage(run).join(exported_weights(at, power_name(length))))
        check_target("safetensors", to)
    export_weights(load_source(run, weights=power_name(length), step=at), format="safetensors", to=to)
    print(to)


@command(app)
def verify(
    source: Annotated[
        Place,
        typer.Argument(
            metavar="SOURCE", help="A run, a checkpoint or weights that cmscale exported; a local path or s3://."
        ),
        USED,
    ],
    as_json: JsonOption = False,
) -> None:
    """Checks all files of all checkpoints and snapshots, or exported weights. Exits with 1 if one is damaged."""
    from cmscale.config.sources import names_file
    from cmscale.io.storage import open_storage
    from cmscale.runs.checkpoints import committed_steps
    from cmscale.runs.folder import CHECKPOINT_MANIFEST, step_name
    from cmscale.runs.manifest_checks import NOT_SEALED
    from cmscale.runs.source_kind import is_data_set

    if names_file(source):
        _verify_exported(source, as_json=as_json)
        return
    manifest = open_storage(source).read_if_present(CHECKPOINT_MANIFEST)
    if manifest is not None and is_data_set(manifest):
        raise UserError(f"{source}: is a prepared data set; verify it with data_prep/verify.py")
    if manifest is None and not any(committed_steps(source, within=folder) for folder in ("checkpoints", "snapshots")):
        _verify_exported(source, as_json=as_json)
        return

    from cmscale.engine.checkpoint_reader import is_sealed, list_checkpoints, size_of, verify_checkpoint
    from cmscale.io import traffic

    if manifest is not None:
        found: dict[str, str] = {source: source}
    else:
        found = {step_name(listed.step): listed.url for listed in list_checkpoints(source)}
        snapshots = list_checkpoints(source, within="snapshots")
        found |= {f"snapshots/{step_name(listed.step)}": listed.url for listed in snapshots}
    all_problems: dict[str, list[str]] = {}
    with traffic.showing(f"checking {source}", sum(map(size_of, found.values()))):
        for name, checkpoint in found.items():
            all_problems[name] = problems = verify_checkpoint(checkpoint)
            if not as_json:
                notice = "" if problems or is_sealed(checkpoint) else f" ({NOT_SEALED})"
                print(f"{name}: {'; '.join(problems) if problems else 'good'}{notice}", flush=True)
    if as_json:
        print_json(all_problems)
    if any(all_problems.values()):
        raise typer.Exit(1)


def _verify_exported(place: Place, *, as_json: bool) -> None:
    """Reads exported weights, which compares their hash. Exits with 1 if they are damaged."""
    from cmscale.runs.source_kind import kind_of_source

    if kind_of_source(place) not in (EXPORTED, DIFFUSERS):
        raise UserError(f"{place}: holds no checkpoint; give a run, a checkpoint folder or weights with their config")

    from cmscale.source import load_source

    problems: list[str] = []
    try:
        load_source(place)
    except UserError as error:
        problems = [str(error)]
    if as_json:
        print_json({place: problems})
    else:
        print(problems[0] if problems else f"{place}: good")
    if problems:
        raise typer.Exit(1)
