"""The command that draws samples: `sample`."""

from typing import Annotated, Literal

import typer
from rich.console import Console

from cmscale.cli.command import GIVEN, command
from cmscale.cli.models import load_model
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
from cmscale.commands.counting import Counting
from cmscale.commands.parser import Output
from cmscale.commands.use import USED, Given, Use
from cmscale.io.place import Place

app = typer.Typer()
console = Console(stderr=True)

OutOption = Annotated[
    Place, typer.Option(help="`.npz` with arr_0, uint8 NHWC, as the ADM evaluator reads it."), USED, Output((".npz",))
]
StepsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Sampling steps. Default: 1; EDM: the config's."),
    Use(excludes=("times",)),
]
GridOption = Annotated[
    Place | None,
    typer.Option(help="Also write a PNG grid of the samples (of the first 256)."),
    USED,
    Output((".png",)),
]
NoiseOption = Annotated[Place | None, typer.Option(help="`.npy` of unit-variance start noise, float32 NCHW."), USED]
SamplerOption = Annotated[
    Literal["heun", "euler", "dpm2", "ancestral"],
    typer.Option(help="EDM models only."),
    Use(model=(situation.DIFFUSION_MODEL,)),
]
ClipOption = Annotated[
    bool,
    typer.Option(help="Clamp every estimate to [-1, 1], as the released code does."),
    Use(written=(situation.AS_UINT8,)),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(help="Conditional models: 1,2 (in turn), or `random`."),
    Use(classes=(situation.CONDITIONAL,)),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Samples drawn at once; changes pixels by rounding."), USED]


@command(app)
def sample(
    source: SourceArgument,
    out: OutOption,
    num: Annotated[int, typer.Option("--samples", min=1, help="Number of samples."), USED] = 64,
    steps: StepsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise."), Use(randomness=(situation.DRAWN,))] = 0,
    grid: GridOption = None,
    noise: NoiseOption = None,
    times: TimesOption = None,
    sampler: SamplerOption = "heun",
    raw: Annotated[bool, typer.Option(help="Write float32 NCHW without clipping."), USED] = False,
    clip: ClipOption = True,
    classes: ClassesOption = None,
    batch_size: BatchSizeOption = 64,
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

    written = situation.AS_FLOAT32 if raw else situation.AS_UINT8
    chosen = choose_device(device)
    loaded = load_model(
        source, given=given, weights=weights, step=step, config=config, overrides=overrides, written=written
    )
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
    with Counting("sampling", total=num, unit="samples") as counting:
        images = draw_samples(loaded, request, device=chosen, advance=counting.advance)
    write_samples(images, out, raw=raw, grid=grid)
    print(out)
