"""The `cmscale` command: what people type, turned into calls; a user's mistake is one line and exit status 2."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cmscale.cli import evaluation as cli_evaluate
from cmscale.cli.options import (
    ConfigOption,
    DeviceOption,
    OverridesArgument,
    SourceArgument,
    StepOption,
    TimesOption,
    WeightsOption,
    checkpoint_step,
)
from cmscale.errors import UserError

# Heavy imports stand in the commands: `cmscale --help` and `cmscale runs` answer at once.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(cli_evaluate.app)
console = Console(stderr=True)


def main() -> None:
    """Entry point: exit status 2 for a user's mistake, 1 for a fault."""
    try:
        app()  # exits by itself, with 2 where the command line is wrong
    except UserError as error:
        print(f"cmscale: {error}", file=sys.stderr)
        sys.exit(2)
    except ConnectionError as error:
        print(f"cmscale: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def doctor() -> None:
    """Says what this machine offers: packages, devices, attention kernels, Slurm, S3."""
    from cmscale.cli.doctor import findings

    table = Table("what", "found", box=None)
    for what, found in findings():
        table.add_row(what, found)
    Console().print(table)


@app.command()
def sample(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="`.npz` with arr_0, uint8 NHWC, as the ADM evaluator reads it.")],
    num: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 1; of an EDM model, the config's.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    grid: Annotated[Path | None, typer.Option(help="Also a PNG of the samples.")] = None,
    noise: Annotated[Path | None, typer.Option(help="`.npy` of unit-variance start noise, float32 NCHW.")] = None,
    times: TimesOption = None,
    sampler: Annotated[Literal["heun", "euler", "dpm2", "ancestral"], typer.Option(help="Of an EDM model.")] = "heun",
    raw: Annotated[bool, typer.Option(help="Keep float32, NCHW, unclipped estimates included.")] = False,
    clip: Annotated[bool, typer.Option(help="Hold every estimate in [-1, 1], as the released code does.")] = True,
    classes: Annotated[str | None, typer.Option(help="Of a conditional model: 1,2 in turn, or `random`.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    device: DeviceOption = "auto",
) -> None:
    """Draws samples; sample i depends on (seed, i) alone."""
    from cmscale.distributed.world import choose_device
    from cmscale.generation.draw import SampleRequest, draw_samples, parse_classes, write_samples
    from cmscale.source import load_source

    chosen = choose_device(device)
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides or [])
    request = SampleRequest(
        num=num,
        steps=steps,
        seed=seed,
        sampler=sampler,
        clip=clip and not raw,
        batch_size=batch_size,
        classes=parse_classes(classes),
    )
    request = request.with_files(noise=noise, times=times, shape=loaded.image_shape)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=num)
        images = draw_samples(loaded, request, device=chosen, advance=lambda count: progress.advance(task, count))
    write_samples(images, out, raw=raw, grid=grid)
    print(out)


@app.command()
def edit(
    task: Annotated[Literal["inpaint", "colorize", "superres", "stroke", "interpolate", "denoise"], typer.Argument()],
    source: SourceArgument,
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE... [KEY=VALUE]...",
            help="Image files (`interpolate`: two, or none and --seed); overrides on top of --config.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG: what went in beside what came out.")] = Path("edit.png"),
    mask: Annotated[Path | None, typer.Option(help="inpaint: white where pixels are missing.")] = None,
    box: Annotated[str | None, typer.Option(help="inpaint: missing box LEFT,TOP,RIGHT,BOTTOM in pixels.")] = None,
    factor: Annotated[int, typer.Option(min=2, help="superres: side of the patches.")] = 8,
    sigma: Annotated[float, typer.Option(help="denoise: the noise's standard deviation, images in [-1, 1].")] = 0.5,
    steps: Annotated[int, typer.Option(min=2, help="Times of the grid.")] = 40,
    count: Annotated[int, typer.Option(min=2, help="interpolate: pictures in the strip.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Edits images with a consistency model, without training for it (paper, algorithm 4)."""
    from cmscale.distributed.world import choose_device
    from cmscale.generation.edit_images import EditRequest, edit_images
    from cmscale.source import load_source

    chosen = choose_device(device)
    overrides = [text for text in map(str, images or []) if "=" in text and not Path(text).exists()]
    files = tuple(path for path in images or [] if str(path) not in overrides)
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides)
    request = EditRequest(
        task=task, images=files, mask=mask, box=box, factor=factor, sigma=sigma, steps=steps, count=count, seed=seed
    )
    with console.status(task):
        edit_images(loaded, request, out=out, device=chosen)
    print(out)


@app.command("consistency-error")
def consistency_error(
    source: SourceArgument,
    data: Annotated[str | None, typer.Option(help="A prepared data set, best a held-out one.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON; default: the run's evaluations/consistency folder.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also a PNG of the error against time.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    teacher: Annotated[
        str | None, typer.Option(help="A diffusion model whose ODE is followed; default: a distilled source's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    device: DeviceOption = "auto",
) -> None:
    """Measures how far a consistency model is from constant along held-out trajectories, at 100 unseen times."""
    from cmscale.distributed.world import choose_device
    from cmscale.evaluation.consistency_curve import measure_consistency_error
    from cmscale.source import load_source

    chosen = choose_device(device)
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides or [])
    with console.status("following trajectories"):
        path = measure_consistency_error(
            loaded,
            data=data,
            num=num,
            seed=seed,
            teacher=teacher,
            out=out,
            plot=plot,
            batch_size=batch_size,
            device=chosen,
        )
    print(path)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, a checkpoint, exported weights or an OpenAI .pt.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="Path or s3:// of the file (diffusers: of the folder); without it, copies of a run's checkpoints "
            "that its checkpoint.export_to lacks are finished."
        ),
    ] = None,
    format: Annotated[Literal["safetensors", "openai", "diffusers"], typer.Option()] = "safetensors",
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
) -> None:
    """Writes weights in a format that others load, or finishes a run's copies of its checkpoints."""
    from cmscale.source import load_source
    from cmscale.weights_export import export_weights, finish_copies

    if to is None:
        for copied in finish_copies(Path(source)):
            print(f"step {copied}: copied")
        return
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides or [])
    with console.status(f"writing {to}"):
        export_weights(loaded, format=format, to=to)
    print(to)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="FILE", help="OpenAI .pt, diffusers folder or safetensors.")],
    to: Annotated[str, typer.Option(help="Path or s3:// of a .safetensors file that carries its config.")],
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
) -> None:
    """Reads foreign weights, strictly, and writes them as safetensors that need no --config any more."""
    export(source, to=to, format="safetensors", config=config, overrides=overrides)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run or a checkpoint; a local path or s3://.")],
) -> None:
    """Checks every file of every checkpoint against its manifest; no GPU needed. Exit status 1 if one is bad."""
    from cmscale.engine.checkpoint_reader import list_checkpoints, verify_checkpoint
    from cmscale.io.storage import open_storage
    from cmscale.runs.folder import CHECKPOINT_MANIFEST, step_name

    if open_storage(run).read_if_present(CHECKPOINT_MANIFEST) is not None:
        found = {run: run}
    else:
        found = {step_name(listed.step): listed.url for listed in list_checkpoints(run)}
    if not found:
        raise UserError(f"{run}: no checkpoint there")
    bad = 0
    for name, checkpoint in found.items():
        problems = verify_checkpoint(checkpoint)
        bad += bool(problems)
        print(f"{name}: {'; '.join(problems) if problems else 'good'}")
    if bad:
        raise typer.Exit(1)


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(help="A config file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    tflops: Annotated[float, typer.Option(help="What one GPU sustains on this network.")] = 150.0,
) -> None:
    """Says what a config will cost: parameters, memory of a rank, FLOP, days."""
    from cmscale.config import read_config
    from cmscale.training.estimate import estimates

    table = Table("what", "estimate", box=None)
    settings = read_config(config, overrides)
    for what, value in estimates(settings, num_ranks=nodes * gpus_per_node, tflops=tflops):
        table.add_row(what, value)
    Console().print(table)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    beside: Annotated[list[Path] | None, typer.Option(help="Another run to show beside it; may be repeated.")] = None,
) -> None:
    """Builds report/index.html of a run."""
    from cmscale.report import build_report
    from cmscale.runs.folder import RunDir

    for folder in [run, *(beside or [])]:
        if not RunDir(folder).config.is_file():
            raise UserError(f"{folder}: not a run (no config.yaml)")
    print(build_report(RunDir(run), siblings=[RunDir(folder) for folder in beside or []]))


@app.command()
def runs(runs_dir: Annotated[Path, typer.Argument(help="The folder that holds runs.")] = Path("runs")) -> None:
    """Lists runs: method, step, loss, how they stand."""
    from cmscale.config import read_config
    from cmscale.runs.folder import RunDir
    from cmscale.runs.log import is_of_evaluation, latest_metrics, read_lines

    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: no such folder")
    table = Table("run", "method", "step", "of", "loss", "last event", box=None)
    for path in sorted(child.parent for child in runs_dir.glob("*/config.yaml")):
        run = RunDir(path)
        try:
            config = read_config(run.config)
        except UserError as error:
            table.add_row(run.name, "?", "", "", "", str(error))
            continue
        metrics = latest_metrics(run)
        last = metrics[-1] if metrics else {"step": 0, "loss": float("nan")}
        events = [event["event"] for event in read_lines(run.events) if not is_of_evaluation(event["event"])]
        table.add_row(
            run.name,
            config.method.kind,
            str(last["step"]),
            str(config.train.total_steps),
            f"{last['loss']:.4g}",
            events[-1] if events else "never started",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
def schema() -> None:
    """Prints the JSON Schema of a config file, for editors."""
    from cmscale.config import json_schema

    print(json.dumps(json_schema(), indent=1))


if __name__ == "__main__":
    main()
