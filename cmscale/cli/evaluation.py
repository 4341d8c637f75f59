"""Owns the commands that measure samples: `cmscale evaluate`, `cmscale search-times`."""

import sys
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from cmscale.cli.options import (
    ConfigOption,
    DeviceOption,
    DINOv2Option,
    FeaturesOption,
    InceptionOption,
    OverridesArgument,
    ReferenceOption,
    SourceArgument,
    StepOption,
    TimesOption,
    WeightsOption,
    checkpoint_step,
)

T = TypeVar("T")
app = typer.Typer()


@app.command()
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="As for sample; or finished samples: .npz with arr_0, or a folder of images."
        ),
    ],
    reference: ReferenceOption = None,
    out: Annotated[Path | None, typer.Option(help="JSON; default: the run's evaluations folder.")] = None,
    samples: Annotated[int | None, typer.Option(help="Default: the config's evaluate.num_samples.")] = None,
    steps: Annotated[str | None, typer.Option(help="Numbers of steps, 1,2,4,8")] = None,
    times: TimesOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Independent sets of samples, for the error bars.")] = 1,
    features: FeaturesOption = None,
    inception_weights: InceptionOption = None,
    dinov2_weights: DINOv2Option = None,
    weights: Annotated[
        str | None, typer.Option(help="EMAs' names, or `master`, several as A,B; default: the config's first EMA.")
    ] = None,
    step: Annotated[str, typer.Option(help="Of a run: steps of checkpoints, 0,latest")] = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    device: DeviceOption = "auto",
) -> None:
    """Measures FID, sFID, IS, KID, precision and recall on this machine (`launchers/evaluate.py`: on many)."""
    from cmscale.distributed.world import detect
    from cmscale.evaluation.evaluate import Request, run_here

    request = Request(
        source=source,
        reference=reference,
        out=None if out is None else str(out),
        samples=samples,
        steps=steps,
        times=times,
        seeds=seeds,
        features=features,
        inception_weights=inception_weights,
        dinov2_weights=dinov2_weights,
        weights=weights,
        checkpoints=step,
        config=config,
        overrides=overrides or [],
        device=device,
    )
    paths = or_interrupted(run_here(request))
    if detect("cpu").is_main:  # torchrun starts this on every rank
        for path in paths:
            print(path)


@app.command("search-times")
def search_times(
    source: SourceArgument,
    steps: Annotated[int, typer.Option(min=2, help="How many times to find; the first is sigma_max.")] = 2,
    reference: ReferenceOption = None,
    samples: Annotated[int | None, typer.Option(help="Of each trial; default: evaluate.num_samples.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON; default: the run's evaluations/times folder.")] = None,
    features: FeaturesOption = None,
    inception_weights: InceptionOption = None,
    dinov2_weights: DINOv2Option = None,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    device: DeviceOption = "auto",
) -> None:
    """Finds the times of multistep sampling: greedy ternary search on FID; goes on where it was interrupted."""
    from cmscale.evaluation.search_times import Request, run

    request = Request(
        source=source,
        steps=steps,
        reference=reference,
        samples=samples,
        seed=seed,
        out=out,
        features=features,
        inception_weights=inception_weights,
        dinov2_weights=dinov2_weights,
        weights=weights,
        step=checkpoint_step(step),
        config=config,
        overrides=overrides or [],
        device=device,
    )
    print(or_interrupted(run(request)))


def or_interrupted(result: T | None) -> T:
    """The result, or the end of the command where a signal came between."""
    if result is None:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        raise typer.Exit(1)
    return result
