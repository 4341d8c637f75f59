"""Arguments and options that several commands share."""

from typing import Annotated, Literal

import typer

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A run, a checkpoint, exported weights or an OpenAI .pt; a local path or s3://."
    ),
]
WeightsOption = Annotated[str | None, typer.Option(help="An EMA's name, or `master`. Default: the config's first EMA.")]
StepOption = Annotated[str, typer.Option(help="Step of a run's checkpoint, or `latest`.")]
ConfigOption = Annotated[str | None, typer.Option(help="Config of weights without one (another project's).")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values of --config to replace.")
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto uses CUDA if there is a device.")]
TimesOption = Annotated[
    str | None, typer.Option(help="Descending sigmas to sample at, such as 80,4.4, or the JSON of search-times.")
]
