"""Commands that draw samples and edit images: `sample`, `edit`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from cmscale.cli.command import GIVEN, command
from cmscale.cli.options import (
    ConfigOption,
    DeviceOption,
    OverridesArgument,
    SourceArgument,
    StepOption,
    TimesOption,
    WeightsOption,
)
from cmscale.commands import situation
from cmscale.commands.parser import Output
from cmscale.commands.use import USED, Given, Use
from cmscale.errors import UserError
from cmscale.io.place import Place

app = typer.Typer()
console = Console(stderr=True)


@command(app)
def sample(
    source: SourceArgument,
    out: Annotated[
        Place,
        typer.Option(help="`.npz` with arr_0, uint8 NHWC, as the ADM evaluator reads it."),
        USED,
        Output((".npz",)),
    ],
    num: Annotated[int, typer.Option("--samples", min=1, help="Number of samples."), USED] = 64,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Sampling steps. Default: 1; EDM: the config's."),
        Use(excludes=("times",)),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise."), Use(randomness=(situation.DRAWN,))] = 0,
    grid: Annotated[
        Place | None,
        typer.Option(help="Also write a PNG grid of the samples (of the first 256)."),
        USED,
        Output((".png",)),
    ] = None,
    noise: Annotated[
        Place | None, typer.Option(help="`.npy` of unit-variance start noise, float32 NCHW."), USED
    ] = None,
    times: TimesOption = None,
    sampler: Annotated[
        Literal["heun", "euler", "dpm2", "ancestral"],
        typer.Option(help="EDM models only."),
        Use(model=(situation.DIFFUSION_MODEL,)),
    ] = "heun",
    raw: Annotated[bool, typer.Option(help="Write float32 NCHW without clipping."), USED] = False,
    clip: Annotated[
        bool,
        typer.Option(help="Clamp every estimate to [-1, 1], as the released code does."),
        Use(written=(situation.AS_UINT8,)),
    ] = True,
    classes: Annotated[
        str | None,
        typer.Option(help="Conditional models: 1,2 (in turn), or `random`."),
        Use(classes=(situation.CONDITIONAL,)),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples drawn at once; changes pixels by rounding."), USED
    ] = 64,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    device: DeviceOption = "auto",
    given: Given = GIVEN,
) -> None:
    """Draws samples. The noise and class of sample i depend only on (seed, i).

    In a batch of another size the network rounds differently, which may change a pixel by 1 of 255 levels.
    """
    from cmscale.distributed.world import choose_device
    from cmscale.generation.draw import SampleRequest, draw_samples, parse_classes, situation_of, write_samples
    from cmscale.source import checkpoint_step, load_source, model_kind

    written = situation.AS_FLOAT32 if raw else situation.AS_UINT8
    overriding = situation.overriding(config)
    given.refuse_unused(source=model_kind(source), written=written, overriding=overriding)
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
    request = request.with_files(noise=noise, times=times, shape=loaded.image_shape, method=loaded.config.method)
    given.refuse_unused(**situation_of(loaded, request))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=num)
        images = draw_samples(loaded, request, device=chosen, advance=lambda count: progress.advance(task, count))
    write_samples(images, out, raw=raw, grid=grid)
    print(out)


@command(app)
def edit(
    task: Annotated[
        Literal["inpaint", "colorize", "superres", "stroke", "interpolate", "denoise"], typer.Argument(), USED
    ],
    source: SourceArgument,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... [KEY=VALUE]...",
            help="Image files (`interpolate`: two, or none and --seed); overrides on top of --config.",
        ),
        USED,
    ] = None,
    out: Annotated[
        Place,
        typer.Option(
            help="PNG of the result, at the model's size; of several images FILE-1.png, FILE-2.png, ...; local or s3://."
        ),
        USED,
        Output((".png",)),
    ] = Place("edit.png"),  # noqa: B008 (a constant)
    strip: Annotated[
        Place | None,
        typer.Option(help="Also write a PNG with each image, the task's input and the result."),
        Use(task=("inpaint", "colorize", "superres", "stroke", "denoise")),
        Output((".png",)),
    ] = None,
    mask: Annotated[
        Place | None,
        typer.Option(
            help="inpaint: image that is white or transparent where pixels are missing, as large as the picture."
        ),
        Use(task=("inpaint",)),
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(help="inpaint: missing box LEFT,TOP,RIGHT,BOTTOM in pixels."),
        Use(task=("inpaint",), excludes=("mask",)),
    ] = None,
    factor: Annotated[
        int, typer.Option(min=2, help="superres: side of a patch in pixels."), Use(task=("superres",))
    ] = 8,
    sigma: Annotated[
        float, typer.Option(help="denoise: std of the noise, for images in [-1, 1]."), Use(task=("denoise",))
    ] = 0.5,
    steps: Annotated[
        int,
        typer.Option(min=2, help="inpaint, colorize, superres: number of times in the grid."),
        Use(task=("inpaint", "colorize", "superres")),
    ] = 40,
    count: Annotated[
        int,
        typer.Option("--samples", min=2, help="interpolate: number of pictures in the strip."),
        Use(task=("interpolate",)),
    ] = 8,
    seed: Annotated[int, typer.Option(min=0), USED] = 0,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    given: Given = GIVEN,
) -> None:
    """Edits images with a consistency model (zero-shot; Song et al. 2023, algorithm 4)."""
    from cmscale.distributed.world import choose_device
    from cmscale.generation.edit_images import EditRequest, edit_images, result_paths
    from cmscale.io.fetch import local_file
    from cmscale.source import checkpoint_step, load_source, model_kind

    given.refuse_unused(task=task, source=model_kind(source))
    chosen = choose_device(device)
    overrides = [text for text in images or [] if "=" in text and not Path(text).exists()]
    if overrides and config is None:
        raise UserError(f"{overrides[0]}: has no effect on {situation.OWN_CONFIG}, only on {situation.GIVEN_CONFIG}")
    named = [Place(text) for text in images or [] if text not in overrides]
    outputs = result_paths(out, 1 if task == "interpolate" else len(named))
    for place in (*outputs, *filter(None, [strip])):
        if same := next((image for image in (*named, *filter(None, [mask])) if image.is_same(place)), None):
            raise UserError(f"{place}: would replace the image {same}; name another file")
    if strip is not None and any(strip.is_same(place) for place in outputs):
        raise UserError(f"--strip {strip}: is the file of a result, too; name another one")
    files = tuple(local_file(place) for place in named)
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides)
    request = EditRequest(
        task=task,
        images=files,
        mask=None if mask is None else local_file(mask),
        box=box,
        factor=factor,
        sigma=sigma,
        steps=steps,
        count=count,
        seed=seed,
    )
    with console.status(task):
        paths = edit_images(loaded, request, out=out, strip=strip, device=chosen)
    for path in paths:
        print(path)
