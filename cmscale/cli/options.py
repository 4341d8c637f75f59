"""Owns the arguments and options that several commands share."""

from typing import Annotated, Literal

import typer

from cmscale.errors import UserError

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A run, a checkpoint, exported weights or an OpenAI .pt; a local path or s3://."
    ),
]
WeightsOption = Annotated[str | None, typer.Option(help="An EMA's name, or `master`; default: the config's first EMA.")]
StepOption = Annotated[str, typer.Option(help="Of a run: the checkpoint's step, or `latest`.")]
ConfigOption = Annotated[str | None, typer.Option(help="Config for weights that carry none (OpenAI .pt).")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides on top of --config.")
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes CUDA where there is one.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option(help="A prepared data set, a folder, a statistics file; default: the config's, else its data."),
]
FeaturesOption = Annotated[Literal["inception", "dinov2", "efficientnet"] | None, typer.Option()]
InceptionOption = Annotated[str | None, typer.Option(help="Local path or s3://, maybe with #sha256=HEX.")]
DINOv2Option = Annotated[str | None, typer.Option(help="DINOv2's published weights, local path or s3://.")]
TimesOption = Annotated[
    str | None, typer.Option(help="Descending sigmas in place of the default ones, 80,4.4; or a search's JSON.")
]


def checkpoint_step(text: str) -> int | None:
    """What `--step` says of one checkpoint: its step, or None for the newest."""
    if text == "latest":
        return None
    if not text.isdecimal():
        raise UserError(f"--step: got {text!r}; it should be a number or latest")
    return int(text)
