"""Finds what a SOURCE is, and which of its checkpoints and weights are meant."""

from collections.abc import Sequence

from cmscale.commands import situation
from cmscale.config.averages import length_of
from cmscale.config.sampling_times import parse_step
from cmscale.engine.checkpoint_reader import list_checkpoints, read_manifest
from cmscale.errors import UserError
from cmscale.io.storage import open_storage
from cmscale.runs.folder import step_name, step_of
from cmscale.runs.manifests import CheckpointManifest
from cmscale.runs.source_kind import kind_of_source


def model_kind(origin: str) -> str:
    """What a SOURCE of weights is: see `kind_of_source`.

    Raises:
        UserError: there is none, or it is finished samples.
    """
    kind = kind_of_source(origin)
    if kind == situation.SAMPLES:
        raise UserError(f"{origin}: no run, checkpoint or exported weights; finished samples are for cmscale evaluate")
    return kind


def check_choices(origin: str, *, steps: Sequence[int | None], weights: Sequence[str | None]) -> None:
    """Checks that a run or checkpoint has all these steps and weights, before any of them is read.

    Args:
        steps: None is the newest.
        weights: None is the first EMA.

    Raises:
        UserError: a checkpoint or weights that do not exist.
    """
    kind = model_kind(origin)
    if kind not in situation.WITH_WEIGHTS_TO_CHOOSE:
        return
    found = [origin] if kind == situation.CHECKPOINT else [checkpoint_url(origin, step) for step in steps]
    for url in found:
        manifest = read_manifest(open_storage(url))
        for name in weights:
            if name is not None:
                check_weights_name(url, manifest, name)


def check_weights_name(origin: str, manifest: CheckpointManifest, name: str) -> None:
    if length_of(name) is not None and any(length_of(quantity) for quantity in manifest.quantities):
        return
    if name not in manifest.quantities or name.startswith("exp_avg"):
        known = [quantity for quantity in manifest.quantities if not quantity.startswith("exp_avg")]
        raise UserError(f"{origin}: no weights {name!r}; choose from {', '.join(known)}")


def newest_step(run: str) -> int:
    """The step of a run's newest checkpoint.

    Raises:
        UserError: it has none.
    """
    return step_of(checkpoint_url(run, None).rpartition("/")[2])


def checkpoint_url(run: str, step: int | None) -> str:
    """The checkpoint of a step of a run; the newest for None."""
    storage = open_storage(run)
    steps = [listed.step for listed in list_checkpoints(run)]
    if not steps:
        raise UserError(f"{run}: the run has no complete checkpoint yet; wait for its first, or give another SOURCE")
    if step is not None and step not in steps:
        raise UserError(f"{run}: no checkpoint of step {step}; choose from {', '.join(map(str, steps))}")
    return storage.join(f"checkpoints/{step_name(steps[-1] if step is None else step)}")


def checkpoint_step(text: str) -> int | None:
    """The step that `--checkpoint` names; None for the newest checkpoint.

    Raises:
        UserError: neither a number nor `latest`.
    """
    try:
        return parse_step(text)
    except ValueError as error:
        raise UserError(f"--checkpoint: {error}") from None
