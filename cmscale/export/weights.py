"""Exports a source's weights to a format that other programs load, and finishes the copies of a run's checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import assert_never

from cmscale.config import Config
from cmscale.engine.pending_export import export_pending
from cmscale.errors import UserError
from cmscale.export.card import SAMPLES, model_card
from cmscale.export.card_file import begun, replaceable_card, sealed, write_first_card
from cmscale.export.metadata import UNKNOWN
from cmscale.export.target import Format, card_of, copy_settings, is_folder_of
from cmscale.export.usage import unlike_openai
from cmscale.interop import (
    check_folder,
    refuse_another_model,
    refuse_inexpressible,
    write_diffusers,
    write_openai,
    write_safetensors,
)
from cmscale.io.locks import hold
from cmscale.io.place import Place
from cmscale.io.protocol import Forbidden
from cmscale.io.storage import open_parent, open_storage
from cmscale.runs.copies import Copied
from cmscale.runs.folder import RunDir
from cmscale.runs.results import EvaluationResult, read_evaluations
from cmscale.runs.source_kind import CARD, EXPORTED_WEIGHTS
from cmscale.source import Source, dataset_of

_LOCK_SECONDS = 1.0  # to find that the holder is dead


def export_weights(source: Source, *, format: Format, to: Place, license: str = UNKNOWN) -> list[str]:
    """Writes the weights and a model card to a path or `s3://` URL. Returns cautions for users of that format.

    `diffusers` is a folder, `openai` a file with the card next to it, `safetensors` either, as `to` is named: a folder
    has the layout of a repository on Hugging Face's hub, with the card as README.md, and a grid of samples if there is
    one of these weights.

    Raises:
        UserError: The format cannot express the network, the file's name has another ending, the target cannot be
            written or holds another model or a card that was edited, another export writes there, or an evaluation of
            the run is not readable.
    """
    with _alone(card_of(format, to), to):
        _export(source, format, to, license)
    return unlike_openai(source.config.method) if format == "openai" else []


@contextmanager
def _alone(card: Place, to: Place) -> Iterator[None]:
    """Keeps other exports from a place on a file system meanwhile: weights and card would be of different steps."""
    storage, name = open_parent(card)
    path = storage.local_path(f".{name}")
    if path is None:
        yield
        return
    was_there = path.parent.exists()
    try:
        with hold(path, timeout=_LOCK_SECONDS, what=f"exporting to {to}", by_creation=True):
            yield
    finally:
        if not was_there:
            with suppress(OSError):  # not empty: the export is in it
                path.parent.rmdir()


def _export(source: Source, format: Format, to: Place, license: str) -> None:
    """Writes what belongs to an export, the card last."""
    is_folder = is_folder_of(format, to)
    _check(source.config, format, to, is_folder=is_folder)
    card_file = card_of(format, to)
    before, is_seen = None, True
    try:
        before = replaceable_card(card_file)
    except Forbidden:
        if is_folder:  # what else is in it can't be seen either
            raise
        is_seen = False
    samples = _samples_of(source) if is_folder else None
    card = model_card(
        source.config,
        step=source.step,
        weights_name=source.weights_name,
        weights_sha256=source.fingerprint,
        dataset=dataset_of(source),
        evaluations=_evaluations(source),
        format=format,
        license=license,
        file=EXPORTED_WEIGHTS if is_folder else to.rpartition("/")[2],
        has_samples=samples is not None,
    )
    if not is_seen:
        write_first_card(card_file, begun(""))  # nothing is written if there is another one
    elif before is not None:
        card_file.write(sealed(begun(SAMPLES if _shows_grid(before) else "")).encode())
    _write(source, format, to, is_folder=is_folder, card=sealed(card))
    if samples is not None:
        open_storage(to).write(SAMPLES, samples)
    if format != "diffusers":
        card_file.write(sealed(card).encode())
    if is_folder and samples is None and before is not None and _shows_grid(before):
        open_storage(to).delete(SAMPLES)  # the grid of the weights before


def _check(config: Config, format: Format, to: Place, *, is_folder: bool) -> None:
    """Raises UserError if the format can't express the network, or a folder holds another model."""
    _refuse_inexpressible(config, format, to)
    if format == "diffusers":
        check_folder(to, config)
    elif is_folder:
        refuse_another_model(
            open_storage(to), config, files=(EXPORTED_WEIGHTS, CARD, SAMPLES), weights=EXPORTED_WEIGHTS
        )


def _write(source: Source, format: Format, to: Place, *, is_folder: bool, card: str) -> None:
    """Writes the weights; a folder of diffusers' with its card, as its index comes last."""
    what = {"config": source.config, "step": source.step, "weights_name": source.weights_name}
    match format:
        case "safetensors":
            file = Place(open_storage(to).join(EXPORTED_WEIGHTS)) if is_folder else to
            write_safetensors(file, source.weights, **what)
        case "openai":
            write_openai(to, source.weights, model=source.config.model)
        case "diffusers":
            write_diffusers(to, source.weights, **what, card=card)
        case _:
            assert_never(format)


def _shows_grid(card: str) -> bool:
    return f"]({SAMPLES})" in card


def _samples_of(source: Source) -> bytes | None:
    """The grid that training drew with these weights: it draws with the first EMA."""
    if source.run_dir is None or source.weights_name != source.config.ema.names[0]:
        return None
    grid = RunDir(source.run_dir).sample_grid(source.step)
    return grid.read_bytes() if grid.is_file() else None


def _refuse_inexpressible(config: Config, format: Format, to: Place) -> None:
    """Raises UserError if the project of a format can't compute what the weights of a config mean."""
    if format == "diffusers":
        refuse_inexpressible(config, to)
    if format == "openai" and config.method.embeds_angle:
        raise UserError(f"{to}: OpenAI's code can't compute this model's time embedding; use safetensors")


def finish_copies(folder: Path, copied: Callable[[Copied], None] = lambda _: None) -> list[Copied]:
    """Copies the checkpoints and snapshots of a run that its `checkpoint.export_to` lacks. Returns them.

    Args:
        copied: Is called with each as soon as its copy is complete.

    Raises:
        UserError: The folder is not a run's, or the run has no `checkpoint.export_to`.
        NotExported: some could not be copied; all others are.
    """
    settings, place = copy_settings(folder)
    return export_pending(RunDir(folder.absolute()), place, settings, copied=copied)


def _evaluations(source: Source) -> list[EvaluationResult]:
    if source.run_dir is None:
        return []
    evaluations, unreadable = read_evaluations(RunDir(source.run_dir))
    if unreadable:
        raise UserError(f"model card: {unreadable[0]}; move the file out of the run's folder")
    return evaluations
