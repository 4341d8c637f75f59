"""The command that edits images: `edit`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cmscale.cli.command import GIVEN, command
from cmscale.cli.models import load_model
from cmscale.cli.options import ConfigOption, DeviceOption, SourceArgument, StepOption, WeightsOption
from cmscale.commands import situation
from cmscale.commands.parser import Output
from cmscale.commands.use import USED, Given, Use
from cmscale.config.methods.base import MOST_STEPS
from cmscale.errors import UserError
from cmscale.io.place import Place
from cmscale.runs.folder import RunDir

if TYPE_CHECKING:
    from cmscale.config import Config
    from cmscale.generation.edit_request import EditInputs, EditRequest

app = typer.Typer()

ImagesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE... [KEY=VALUE]...",
        help="Image files (`interpolate`: two, or none and --seed); overrides on top of --config.",
    ),
    USED,
]
OutOption = Annotated[
    Place,
    typer.Option(
        help="PNG of the result, at the model's size; of several images FILE-1.png, FILE-2.png, ...; local or s3://."
    ),
    USED,
    Output((".png",)),
]
StripOption = Annotated[
    Place | None,
    typer.Option(help="Also write a PNG with each image, the task's input and the result."),
    Use(task=("inpaint", "colorize", "superres", "stroke", "denoise")),
    Output((".png",)),
]
InReportOption = Annotated[
    bool,
    typer.Option("--in-report", help="Also show it in the run's report: writes the strip to RUN/edits/."),
    Use(source=(situation.RUN,)),
]
MaskOption = Annotated[
    Place | None,
    typer.Option(help="inpaint: image that is white or transparent where pixels are missing, as large as the picture."),
    Use(task=("inpaint",)),
]
BoxOption = Annotated[
    str | None,
    typer.Option(
        help="inpaint: missing box LEFT,TOP,RIGHT,BOTTOM in pixels; without it and --mask the centre is missing."
    ),
    Use(task=("inpaint",), excludes=("mask",)),
]
FactorOption = Annotated[int, typer.Option(min=2, help="superres: side of a patch in pixels."), Use(task=("superres",))]
SigmaOption = Annotated[
    float, typer.Option(help="denoise: std of the noise, for images in [-1, 1]."), Use(task=("denoise",))
]
StepsOption = Annotated[
    int,
    typer.Option(min=2, max=MOST_STEPS, help="inpaint, colorize, superres: number of times in the grid."),
    Use(task=("inpaint", "colorize", "superres")),
]
CountOption = Annotated[
    int,
    typer.Option("--samples", min=2, help="interpolate: number of pictures in the strip."),
    Use(task=("interpolate",)),
]


@command(app)
def edit(
    task: Annotated[
        Literal["inpaint", "colorize", "superres", "stroke", "interpolate", "denoise"], typer.Argument(), USED
    ],
    source: SourceArgument,
    images: ImagesArgument = None,
    out: OutOption = Place("edit.png"),  # noqa: B008 (a constant)
    strip: StripOption = None,
    in_report: InReportOption = False,
    mask: MaskOption = None,
    box: BoxOption = None,
    factor: FactorOption = 8,
    sigma: SigmaOption = 0.5,
    steps: StepsOption = 40,
    count: CountOption = 8,
    seed: Annotated[int, typer.Option(min=0), USED] = 0,
    weights: WeightsOption = None,
    step: StepOption = "latest",
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    given: Given = GIVEN,
) -> None:
    """Edits images with a consistency model (zero-shot; Song et al. 2023, algorithm 4)."""
    from cmscale.generation.edit_request import EditRequest, read_inputs, result_paths
    from cmscale.io.fetch import local_file
    from cmscale.runs.choices import check_consistency_model

    given.refuse_unused(task=task)
    overrides = _overrides(images or [], config)
    known = check_consistency_model(source, what="edit", config=config, overrides=overrides)
    named = [Place(text) for text in images or [] if text not in overrides]
    outputs = result_paths(out, 1 if task == "interpolate" else len(named))
    _check_outputs(outputs, strip, inputs=(*named, *filter(None, [mask])))
    run = RunDir(source.local("a run whose report shows edits")) if in_report else None
    request = EditRequest(
        task=task,
        images=tuple(local_file(place) for place in named),
        mask=None if mask is None else local_file(mask),
        box=box,
        factor=factor,
        sigma=sigma,
        steps=steps,
        count=count,
        seed=seed,
    )
    request.check_number()
    inputs = None if known is None else _inputs_of(request, known, source)

    from cmscale.distributed.world import choose_device
    from cmscale.generation.edit_images import edit_images

    chosen = choose_device(device)
    loaded = load_model(source, given=given, weights=weights, step=step, config=config, overrides=overrides)
    inputs = inputs or read_inputs(request, size=loaded.config.model.image_size)
    shown = [] if run is None else [_place_in_report(run, request, loaded.step)]
    paths = edit_images(loaded, request, inputs, out=out, strips=[*filter(None, [strip]), *shown], device=chosen)
    for path in (*paths, *shown):
        print(path)


def _inputs_of(request: "EditRequest", config: "Config", source: Place) -> "EditInputs":
    """The pictures and masks that a task reads, for a model of this config, which must be able to do it."""
    from cmscale.generation.edit_request import read_inputs
    from cmscale.generation.task_settings import check_task

    check_task(config, request, origin=source)
    return read_inputs(request, size=config.model.image_size)


def _place_in_report(run: RunDir, request: "EditRequest", step: int) -> Place:
    """Where the report of a run looks for the edit; it can be written."""
    place = Place(run.edit(request.task, [path.stem for path in request.images], step=step))
    place.check_output()
    return place


def _overrides(images: Sequence[str], config: str | None) -> list[str]:
    """Those of the words that are no images. Raises UserError if there is no config that they could be for."""
    named = ((text, Place(text)) for text in images if "=" in text)
    found = [text for text, place in named if not place.is_remote and not Path(place).exists()]
    if found and config is None:
        raise UserError(
            f"{found[0]}: is no file, and has no effect on {situation.OWN_CONFIG}, only on {situation.GIVEN_CONFIG}"
        )
    return found


def _check_outputs(outputs: Sequence[Place], strip: Place | None, *, inputs: Sequence[Place]) -> None:
    """Raises UserError if an output can't be written, would replace an input, or the strip a result."""
    for place in (*outputs, *filter(None, [strip])):
        place.check_output()
        if same := next((image for image in inputs if image.is_same(place)), None):
            raise UserError(f"{place}: would replace the image {same}; name another file")
    if strip is not None and any(strip.is_same(place) for place in outputs):
        raise UserError(f"--strip {strip}: is the file of a result, too; name another one")
