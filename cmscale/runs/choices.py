"""Checks what is asked of a SOURCE before anything slow: kind, config, checkpoints, weights, sampling times.

Nothing here imports torch, so that a mistake is found in less than a second, and before a job waits in a queue.
"""

from collections.abc import Sequence
from pathlib import Path

from cmscale.commands import situation
from cmscale.config import Config, MethodSection, agreement, read_config
from cmscale.config.averages import LONGEST, SHORTEST, length_of
from cmscale.config.sampling_times import check_range, is_file, parse_step, parse_times
from cmscale.config.site import read_site
from cmscale.config.sources import names_file, refuse_hub_name
from cmscale.errors import UserError
from cmscale.io.fetch import local_file
from cmscale.io.place import Place
from cmscale.io.storage import open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.configs import config_of
from cmscale.runs.manifests import read_document
from cmscale.runs.results import TimeSearch
from cmscale.runs.source_kind import kind_of_source

_WITH_CONFIG = (situation.RUN, situation.CHECKPOINT, situation.EXPORTED)


def check_model(
    source: str,
    *,
    steps: Sequence[int | None] = (None,),
    weights: Sequence[str | None] = (None,),
    config: str | None = None,
    overrides: Sequence[str] = (),
    kind: str | None = None,
) -> Config | None:
    """Checks that a source has the checkpoints and weights that are asked for.

    Args:
        steps: Of a run's checkpoints; None is the newest.
        weights: Names; None is the first EMA.
        config: Config file for a source that has none, with `overrides`.
        kind: The source's kind, if it is known: on S3 it is found with several requests.

    Returns:
        The source's config; None if only reading its weights can tell.

    Raises:
        UserError: there is no such source, checkpoint or config, or it has no such weights.
    """
    refuse_hub_name(source)
    if Place(source).is_remote and names_file(source):
        return None  # a file of gigabytes, which is not fetched for a check
    kind = kind or kind_of_source(source)
    if config is not None:
        return read_config(config, list(overrides), beneath=[read_site().layer])
    if kind == situation.RUN:
        _check_steps(source, steps)
    if kind not in _WITH_CONFIG:
        return None
    place = Place(_run_of(source) if kind == situation.CHECKPOINT else source)
    found = config_of(place, kind=kind if place == source else None)
    if kind in situation.WITH_WEIGHTS_TO_CHOOSE:
        for name in filter(None, weights):
            check_weights_name(found, name, key="--weights")
    return found


def check_consistency_model(
    source: str, *, what: str, config: str | None = None, overrides: Sequence[str] = ()
) -> Config | None:
    """Checks, where the source's config can be read here, that it is an unconditional consistency model.

    Args:
        what: What needs one, for the message: `edit`.

    Returns:
        The source's config; None if only reading its weights can tell.

    Raises:
        UserError: it is another model.
    """
    if Place(source).is_remote:
        return None
    found = check_model(source, config=config, overrides=overrides)
    if found is not None:
        refuse_other_models(found, origin=source, what=what)
    return found


def refuse_other_models(config: Config, *, origin: str, what: str) -> None:
    """Raises UserError if a config is not that of an unconditional consistency model; see `check_consistency_model`."""
    if not config.method.facts.is_consistency_model:
        found = situation.MODEL_OF_SAMPLER[config.method.facts.sampler]
        raise UserError(f"{what}: {origin} is {found} ({config.method.kind}); give a consistency model")
    if config.model.num_classes is not None:
        raise UserError(f"{what}: {origin} is class-conditional; give an unconditional model")


def check_power_averages(run: str, *, step: str, length: float | None) -> None:
    """Checks that a run that can be read here keeps averages by a power function, from which others are computed.

    Args:
        step: Of the checkpoint; `latest` is the newest.
        length: The average that is asked for, if one is.

    Raises:
        UserError: it keeps none, has no such checkpoint, or there is no average of that length.
    """
    try:
        at = parse_step(step)
    except ValueError as error:
        raise UserError(f"--checkpoint: {error}") from None
    if length is not None and not SHORTEST <= length <= LONGEST:
        raise UserError(f"--length {length:g}: must be between {SHORTEST:g} and {LONGEST:g}")
    config = None if Place(run).is_remote else check_model(run, steps=(None if length is None else at,))
    if config is not None and kind_of_source(run) != situation.RUN:
        raise UserError(f"{run}: is no run; give the run, as an average is computed from all its checkpoints")
    if config is not None and not config.ema.lengths:
        raise UserError(f"{run}: keeps no averages to compute others from; a run with ema.lengths does")


def check_followed(teacher: str, follower: Config) -> None:
    """Raises UserError if a model that can be read here is none whose ODE another can follow: `refuse_followed`."""
    found = None if Place(teacher).is_remote else check_model(teacher)
    if found is not None:
        refuse_followed(found, follower, teacher=teacher)


def refuse_followed(config: Config, follower: Config, *, teacher: str) -> None:
    """Raises UserError if a config is not that of an unconditional diffusion model for the images of another's."""
    if not config.method.facts.can_teach:
        raise UserError(f"--teacher {teacher}: is of kind {config.method.kind}; a diffusion model is needed")
    if config.model.image_size != follower.model.image_size:
        raise UserError(f"--teacher {teacher}: its images are {config.model.image_size} px, not the source's")
    if config.model.num_classes is not None:
        raise UserError(f"--teacher {teacher}: is class-conditional, and data sets carry no classes; give another")
    agreement.check_range(config.method, follower.method, key="--teacher", origin=teacher)


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
    check_range(times_of(times), method, label=f"--sampling-times {times}")


def times_of(text: str) -> tuple[float, ...]:
    """The noise levels that `--sampling-times` names; see `check_times`."""
    if is_file(text):
        found = read_document(TimeSearch, local_file(text).read_bytes(), origin=text)
        if not found.times:
            raise UserError(f"--sampling-times {text}: the search is not finished; let cmscale search-times finish")
        return found.times
    try:
        return parse_times(text)
    except ValueError as error:
        raise UserError(f"--sampling-times: {error}") from None
