"""Commands that draw samples and edit images: `sample`, `edit`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from cmscale.cli.options import (
    ConfigOption,
    DeviceOption,
    OverridesArgument,
    SourceArgument,
    StepOption,
    TimesOption,
    WeightsOption,
)

app = typer.Typer()
console = Console(stderr=True)


@app.command()
def sample(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="`.npz` with arr_0, uint8 NHWC, as the ADM evaluator reads it.")],
    num: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps. Default: 1; EDM: the config's.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    grid: Annotated[Path | None, typer.Option(help="Also write a PNG grid of the samples.")] = None,
    noise: Annotated[Path | None, typer.Option(help="`.npy` of unit-variance start noise, float32 NCHW.")] = None,
    times: TimesOption = None,
    sampler: Annotated[Literal["heun", "euler", "dpm2", "ancestral"], typer.Option(help="EDM models only.")] = "heun",
    raw: Annotated[bool, typer.Option(help="Write float32 NCHW without clipping.")] = False,
    clip: Annotated[bool, typer.Option(help="Clamp every estimate to [-1, 1], as the released code does.")] = True,
    classes: Annotated[str | None, typer.Option(help="Conditional models: 1,2 (in turn), or `random`.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples drawn at once; changes pixels by rounding.")] = 64,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    device: DeviceOption = "auto",
) -> None:
    """Draws samples. The noise and class of sample i depend only on (seed, i).

    In a batch of another size the network rounds differently, which may change a pixel by 1 of 255 levels.
    """
    from cmscale.distributed.world import choose_device
    from cmscale.generation.draw import SampleRequest, draw_samples, parse_classes, write_samples
    from cmscale.source import checkpoint_step, load_source

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
    out: Annotated[
        Path, typer.Option(help="PNG of the result, at the model's size; of several images FILE-1.png, FILE-2.png, ...")
    ] = Path("edit.png"),
    strip: Annotated[
        Path | None,
        typer.Option(help="Also write a PNG with each image, the task's input and the result."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="inpaint: image that is white or transparent where pixels are missing, as large as the picture."
        ),
    ] = None,
    box: Annotated[str | None, typer.Option(help="inpaint: missing box LEFT,TOP,RIGHT,BOTTOM in pixels.")] = None,
    factor: Annotated[int, typer.Option(min=2, help="superres: side of a patch in pixels.")] = 8,
    sigma: Annotated[float, typer.Option(help="denoise: std of the noise, for images in [-1, 1].")] = 0.5,
    steps: Annotated[int, typer.Option(min=2, help="Number of times in the grid.")] = 40,
    count: Annotated[int, typer.Option(min=2, help="interpolate: number of pictures in the strip.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Edits images with a consistency model (zero-shot; Song et al. 2023, algorithm 4)."""
    from cmscale.distributed.world import choose_device
    from cmscale.generation.edit_images import EditRequest, edit_images
    from cmscale.source import checkpoint_step, load_source

    chosen = choose_device(device)
    overrides = [text for text in map(str, images or []) if "=" in text and not Path(text).exists()]
    files = tuple(path for path in images or [] if str(path) not in overrides)
    loaded = load_source(source, weights=weights, step=checkpoint_step(step), config=config, overrides=overrides)
    request = EditRequest(
        task=task, images=files, mask=mask, box=box, factor=factor, sigma=sigma, steps=steps, count=count, seed=seed
    )
    with console.status(task):
        paths = edit_images(loaded, request, out=out, strip=strip, device=chosen)
    for path in paths:
        print(path)
