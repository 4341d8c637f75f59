"""Commands that measure: `evaluate`, `search-times`, `consistency-error`."""

from typing import Annotated

import typer

from cmscale.cli.command import GIVEN, command
from cmscale.cli.interruption import or_interrupted
from cmscale.cli.models import load_model
from cmscale.cli.options import (
    ConfigOption,
    DeviceOption,
    OverridesArgument,
    SourceArgument,
    StepOption,
    WeightsOption,
)
from cmscale.cli.request_options import command_for
from cmscale.commands.parser import Output
from cmscale.commands.use import USED, Given
from cmscale.config.requests import EvaluateRequest, SearchTimesRequest
from cmscale.io.place import Place

app = typer.Typer()


@command(app)
@command_for(EvaluateRequest)
def evaluate(request: EvaluateRequest) -> None:
    """Measures FID, sFID, IS, KID, precision and recall on this machine (launchers/evaluate.py: on a cluster).

    SOURCE may also be finished samples: an .npz with arr_0, or a folder of images.
    """
    from cmscale.distributed.world import detect
    from cmscale.evaluation.evaluate import run_here

    paths = or_interrupted(run_here(request))
    if detect("cpu").is_main:  # torchrun starts this on every rank
        for path in paths:
            print(path)


@command(app, "search-times")
@command_for(SearchTimesRequest)
def search_times(request: SearchTimesRequest) -> None:
    """Finds the times of multistep sampling by a greedy ternary search on FID. Continues an interrupted search."""
    from cmscale.evaluation.search_times import run

    print(or_interrupted(run(request)))


@command(app, "consistency-error")
def consistency_error(
    source: SourceArgument,
    data: Annotated[Place | None, typer.Option(help="A prepared data set, preferably held-out."), USED] = None,
    out: Annotated[
        Place | None,
        typer.Option(help="JSON; default: the run's evaluations/consistency folder."),
        USED,
        Output((".json",)),
    ] = None,
    plot: Annotated[
        Place | None, typer.Option(help="Also plot the error against time to a PNG."), USED, Output((".png",))
    ] = None,
    num: Annotated[int, typer.Option("--samples", min=1, help="Images whose trajectories are followed."), USED] = 64,
    teacher: Annotated[
        Place | None,
        typer.Option(help="Diffusion model whose ODE is followed. Default: the source's teacher."),
        USED,
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise."), USED] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once."), USED] = 64,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    device: DeviceOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Measure anew what has been measured already."), USED] = False,
    given: Given = GIVEN,
) -> None:
    """Measures how much a consistency model varies along held-out trajectories, at 100 times unused in training."""
    from cmscale.io.storage import open_storage
    from cmscale.runs.choices import check_consistency_model, check_followed
    from cmscale.runs.manifests import read_dataset_manifest

    known = check_consistency_model(source, what="consistency-error", config=config, overrides=overrides or ())
    if data is not None:
        read_dataset_manifest(open_storage(data))
    if teacher is not None and known is not None:
        check_followed(teacher, known)

    from cmscale.distributed.world import choose_device
    from cmscale.evaluation.consistency_report import measure_consistency_error

    chosen = choose_device(device)
    loaded = load_model(source, given=given, weights=weights, step=step, config=config, overrides=overrides)
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
        force=force,
    )
    print(path)
