"""Checks what is asked of a SOURCE before anything slow: kind, config, checkpoints, weights, sampling times.

Nothing here imports torch, so that a mistake is found in less than a second, and before a job waits in a queue.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from cmscale.commands import situation
from cmscale.config import Config, MethodSection, read_config
from cmscale.config.averages import length_of
from cmscale.config.draw_request import DrawRequest
from cmscale.config.requests import EvaluateRequest, MeasuringRequest, SearchTimesRequest
from cmscale.config.sampling_times import check_range, is_file, parse_step, parse_times
from cmscale.config.site import read_site
from cmscale.config.source_request import SourceRequest
from cmscale.config.sources import names_file, refuse_hub_name
from cmscale.errors import UserError
from cmscale.io.fetch import local_file
from cmscale.io.place import Place, split_hash
from cmscale.io.storage import open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.configs import config_of
from cmscale.runs.manifests import read_document
from cmscale.runs.results import TimeSearch
from cmscale.runs.sample_sets import place_of_seed, set_place
from cmscale.runs.source_kind import kind_of_source

_NO_WEIGHTS = {b"<": "is a web page, not weights", b"version https://": "is a pointer of Git LFS, not weights"}
_WITH_CONFIG = (situation.RUN, situation.CHECKPOINT, situation.EXPORTED)


def check_model(
    source: str,
    *,
    steps: Sequence[int | None] = (None,),
    weights: Sequence[str | None] = (None,),
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> Config | None:
    """Checks that a source has the checkpoints and weights that are asked for.

    Args:
        steps: Of a run's checkpoints; None is the newest.
        weights: Names; None is the first EMA.
        config: Config file for a source that has none, with `overrides`.

    Returns:
        The source's config; None if only reading its weights can tell.

    Raises:
        UserError: there is no such source, checkpoint or config, or it has no such weights.
    """
    refuse_hub_name(source)
    if Place(source).is_remote and names_file(source):
        return None  # a file of gigabytes, which is not fetched for a check
    kind = kind_of_source(source)
    if config is not None:
        return read_config(config, list(overrides), beneath=[read_site().layer])
    if kind == situation.RUN:
        _check_steps(source, steps)
    if kind not in _WITH_CONFIG:
        return None
    found = config_of(Place(_run_of(source) if kind == situation.CHECKPOINT else source))
    if kind in situation.WITH_WEIGHTS_TO_CHOOSE:
        for name in filter(None, weights):
            check_weights_name(found, name, key="--weights")
    return found


def check_consistency_model(
    source: str, *, what: str, config: str | None = None, overrides: Sequence[str] = ()
) -> None:
    """Checks, where the source's config can be read here, that it is an unconditional consistency model.

    Args:
        what: What needs one, for the message: `edit`.

    Raises:
        UserError: it is another model.
    """
    if Place(source).is_remote:
        return
    found = check_model(source, config=config, overrides=overrides)
    if found is not None:
        refuse_other_models(found, origin=source, what=what)


def refuse_other_models(config: Config, *, origin: str, what: str) -> None:
    """Raises UserError if a config is not that of an unconditional consistency model; see `check_consistency_model`."""
    if not config.method.facts.is_consistency_model:
        found = situation.MODEL_OF_SAMPLER[config.method.facts.sampler]
        raise UserError(f"{what}: {origin} is {found} ({config.method.kind}); give a consistency model")
    if config.model.num_classes is not None:
        raise UserError(f"{what}: {origin} is class-conditional; give an unconditional model")


def check_power_averages(run: str) -> None:
    """Raises UserError if a run that can be read here keeps no averages by a power function."""
    config = None if Place(run).is_remote else check_model(run)
    if config is not None and not config.ema.lengths:
        raise UserError(f"{run}: keeps no averages to compute others from; a run with ema.lengths does")


def _run_of(checkpoint: str) -> str:
    """The run that a checkpoint lies in; the checkpoint itself if it lies in none on this machine."""
    root = Path(checkpoint).absolute().parent.parent
    return str(root) if not Place(checkpoint).is_remote and (root / "config.yaml").is_file() else checkpoint


def check_weights_name(config: Config, name: str, *, key: str) -> None:
    """Raises UserError if a run of this config has no weights of this name."""
    known = (*config.ema.names, *config.ema.power_names, "master")
    is_computed = length_of(name) is not None and config.ema.lengths
    if name not in known and not is_computed:
        raise UserError(f"{key} {name}: no such weights; choose from {', '.join(known)}")


def _check_steps(run: str, steps: Sequence[int | None]) -> None:
    there = committed_steps(open_storage(run))
    if not there:
        raise UserError(f"{run}: the run has no complete checkpoint yet; wait for its first, or give another SOURCE")
    for step in steps:
        if step is not None and step not in there:
            raise UserError(f"{run}: no checkpoint of step {step}; choose from {', '.join(map(str, there))}")


def check_times(times: str, method: MethodSection) -> None:
    """Checks noise levels, `80,4.4` or the JSON of a search, against a method's range.

    Raises:
        UserError: there is no such file, its search is not finished, or a time is outside the range.
    """
    check_range(_times(times), method, label=f"--sampling-times {times}")


def _times(text: str) -> tuple[float, ...]:
    if is_file(text):
        found = read_document(TimeSearch, local_file(text).read_bytes(), origin=text)
        if not found.times:
            raise UserError(f"--sampling-times {text}: the search is not finished; let cmscale search-times finish")
        return found.times
    try:
        return parse_times(text)
    except ValueError as error:
        raise UserError(f"--sampling-times: {error}") from None


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
    if not (request.source.is_remote and names_file(request.source)):
        kind = kind_of_source(request.source)
        request.refuse_unused(source=kind)
        if kind == situation.SAMPLES:
            return None
    steps: Sequence[int | None] = (None,)
    weights: Sequence[str | None] = (None,)
    if isinstance(request, EvaluateRequest):
        steps, weights = request.steps_asked, request.weights_asked
    if isinstance(request, SearchTimesRequest):
        steps, weights = (parse_step(request.step),), (request.weights,)
    config = check_model(
        request.source, steps=steps, weights=weights, config=request.config, overrides=request.overrides
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
    settings = request.settings(config.evaluate)
    weights_key, file = settings.weights()
    if file is not None:
        check_weights_file(file, key=_named(request, weights_key))
    if settings.reference is not None and settings.reference.lower().endswith(".npz"):
        check_reference(settings.reference, key=_named(request, "reference"))
    return config


def _check_draw(request: DrawRequest) -> Config | None:
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
    config = check_model(
        request.source,
        steps=(parse_step(request.step),),
        weights=(request.weights,),
        config=request.config,
        overrides=request.overrides,
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
        num_times = sum(time > 0 for time in _times(request.times))
    else:
        num_times = request.steps or config.method.default_sampling_steps
    request.refuse_unused(**request.situation(config, num_times=num_times))
    request.check_fits(config)


def _named(request: MeasuringRequest, key: str) -> str:
    """What names a file: the option, or the key of the config."""
    given = getattr(request, key, None) is not None
    return f"--{key.replace('_', '-')}" if given else f"evaluate.{key}"


def check_weights_file(place: str, *, key: str) -> None:
    """Checks that a local file is none of those that stand for weights by mistake; what it holds the worker checks.

    Raises:
        UserError: there is no such file, it is empty, a web page, or a pointer of Git LFS.
    """
    path = _local(place, key=key)
    if path is None:
        return
    with path.open("rb") as file:
        start = file.read(16)
    found = next((what for sign, what in _NO_WEIGHTS.items() if start.startswith(sign)), None)
    found = found if start else "is empty"
    if found is not None:
        raise UserError(f"{key}: {place}: {found}; copy it again, or give another")


def check_reference(place: str, *, key: str) -> None:
    """Raises UserError if a local `.npz` is damaged or holds neither statistics nor images."""
    path = _local(place, key=key)
    if path is None:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        raise UserError(f"{key}: {place}: damaged, or not an .npz of plain arrays; give another") from None
    if not names & {"arr_0", "mu"}:
        raise UserError(f"{key}: {place}: holds {', '.join(sorted(names)[:5])}; give statistics or images")


def _local(place: str, *, key: str) -> Path | None:
    """The path of a file on this machine; None if it is in a storage, which is not fetched for a check."""
    plain = Place(split_hash(place)[0])
    if plain.is_remote:
        return None
    if not Path(plain).exists():
        raise UserError(f"{key}: {plain}: no such file or folder")
    return Path(plain) if Path(plain).is_file() else None
