"""Arguments and options that several commands share."""

from typing import Annotated, Literal

import typer

from cmscale.commands.situation import GIVEN_CONFIG, RUN, WITH_WEIGHTS_TO_CHOOSE, WITHOUT_CONFIG
from cmscale.commands.use import USED, Use
from cmscale.io.place import Place

SourceArgument = Annotated[
    Place,
    typer.Argument(
        metavar="SOURCE", help="A run, a checkpoint, exported weights or an OpenAI .pt; a local path or s3://."
    ),
    USED,
]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="An EMA's name, or `master`. Default: the config's first EMA."),
    Use(source=WITH_WEIGHTS_TO_CHOOSE),
]
StepOption = Annotated[
    str,
    typer.Option("--checkpoint", metavar="STEP", help="Step of a run's checkpoint, or `latest`."),
    Use(source=(RUN,)),
]
ConfigOption = Annotated[
    Place | None, typer.Option(help="Config of weights without one (another project's)."), Use(source=WITHOUT_CONFIG)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values of --config to replace."),
    Use(overriding=(GIVEN_CONFIG,)),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="auto uses CUDA if there is a device."), USED
]
TimesOption = Annotated[
    Place | None,
    typer.Option(
        "--sampling-times",
        metavar="80,4.4|FILE.json",
        help="Descending noise levels (sigma) to sample at, or the JSON of search-times.",
    ),
    USED,
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON."), USED]
