"""Checks requests for samples, evaluations and searches before anything slow; see `choices`, and without torch, too."""

from collections.abc import Sequence
from pathlib import Path

from cmscale.commands import situation
from cmscale.config import Config, Evaluate
from cmscale.config.draw_request import DrawRequest
from cmscale.config.requests import EvaluateRequest, MeasuringRequest, SearchTimesRequest
from cmscale.config.sampling_times import parse_step
from cmscale.config.source_request import SourceRequest
from cmscale.config.sources import is_npz, names_file
from cmscale.errors import UserError
from cmscale.runs.choices import check_model, check_times, times_of
from cmscale.runs.named_files import check_array_file, check_own_weights, check_reference, check_weights_file
from cmscale.runs.sample_sets import place_of_seed, set_place
from cmscale.runs.source_kind import kind_of_source


def check_request(request: SourceRequest) -> Config | None:
    """Checks a request for samples, an evaluation or a search, as far as that is possible without torch.

    Returns:
        The source's config, as `check_model` does.

    Raises:
        UserError: what the work itself would find later.
    """
    if isinstance(request, DrawRequest):
        return _check_draw(request)
    assert isinstance(request, MeasuringRequest)
    kind = None
    if not (request.source.is_remote and names_file(request.source)):
        kind = kind_of_source(request.source)
        request.refuse_unused(source=kind)
        if kind == situation.SAMPLES:
            _check_measured_by(request, request.settings(Evaluate()), data=None)
            return None
    steps: Sequence[int | None] = (None,)
    weights: Sequence[str | None] = (None,)
    if isinstance(request, EvaluateRequest):
        steps, weights = request.steps_asked, request.weights_asked
    if isinstance(request, SearchTimesRequest):
        steps, weights = (parse_step(request.step),), (request.weights,)
    _check_has_place(request)
    config = check_model(
        request.source, steps=steps, weights=weights, config=request.config, overrides=request.overrides, kind=kind
    )
    if isinstance(request, EvaluateRequest):
        request.refuse_several_in_one_file()
        if request.keep_samples is not None:
            set_place(request.keep_samples, request.kept_format).check("--keep-samples")
    if config is None:
        return None
    if isinstance(request, EvaluateRequest):
        request.check_fits(config)
        if request.times is not None:
            check_times(request.times, config.method)
    _check_measured_by(request, request.settings(config.evaluate), data=config.data.path)
    return config


def _check_measured_by(request: MeasuringRequest, settings: Evaluate, *, data: str | None) -> None:
    """Checks the features' weights and the reference, which is the data if none is named."""
    weights_key, file = settings.weights()
    if file is not None:
        check_weights_file(file, key=_named(request, weights_key))
    if settings.reference is not None:
        check_reference(settings.reference, key=_named(request, "reference"))
    elif data is not None:
        check_reference(data, key="data.path", is_needed=False)
    else:
        raise UserError("evaluate: no reference; give --reference DATASET|FOLDER|FILE.npz")
    if file is None:
        check_own_weights(settings.features)


def _check_has_place(request: MeasuringRequest) -> None:
    """Raises UserError if a result has no place: SOURCE is no run here, and no other is named."""
    assert isinstance(request, EvaluateRequest | SearchTimesRequest)
    if request.out is not None or getattr(request, "run_dir", None) is not None or is_npz(request.source):
        return
    kind = None if request.source.is_remote else kind_of_source(request.source)
    is_in_run = kind == situation.CHECKPOINT and Path(request.source).absolute().parent.name == "checkpoints"
    if kind != situation.RUN and not is_in_run:
        raise UserError(f"{request.source}: not a run on this machine; give --out FILE.json for the result")


def _check_draw(request: DrawRequest) -> Config | None:
    kind = None
    if not (request.source.is_remote and names_file(request.source)):
        kind = kind_of_source(request.source)
        if kind == situation.SAMPLES:
            raise UserError(f"{request.source}: finished samples; give the model that draws them")
        request.refuse_unused(source=kind)
    format, written = request.format_asked(), situation.AS_FLOAT32 if request.raw else situation.AS_UINT8
    request.refuse_unused(
        format=situation.AS_NPZ if format == "npz" else situation.AS_FILES,
        written=written,
    )
    for seed in range(request.seed, request.seed + request.seeds):
        set_place(place_of_seed(request.out, seed, request.seeds), format).check("--out")
    if request.noise is not None and not request.noise.is_remote and not Path(request.noise).is_file():
        raise UserError(f"--noise {request.noise}: no such file")
    if request.noise is not None and not request.noise.is_remote:
        check_array_file(request.noise, key="--noise")
    config = check_model(
        request.source,
        steps=(parse_step(request.step),),
        weights=(request.weights,),
        config=request.config,
        overrides=request.overrides,
        kind=kind,
    )
    if config is not None:
        check_drawn_by(request, config)
    return config


def check_drawn_by(request: DrawRequest, config: Config) -> None:
    """Checks what is asked of a model of this config: times, steps, classes, and options that need another one.

    Raises:
        UserError: the model has no such times or classes, or an option has no effect on it.
    """
    if request.times is not None:
        check_times(request.times, config.method)
        num_times = sum(time > 0 for time in times_of(request.times))
    else:
        num_times = request.steps or config.method.default_sampling_steps
    request.refuse_unused(**request.situation(config, num_times=num_times))
    request.check_fits(config)


def _named(request: MeasuringRequest, key: str) -> str:
    """What names a file: the option, or the key of the config."""
    given = getattr(request, key, None) is not None
    return f"--{key.replace('_', '-')}" if given else f"evaluate.{key}"
