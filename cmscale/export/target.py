"""Checks what is asked of an export before torch is imported and weights are read: its place, its licence."""

import contextlib
import re
from pathlib import Path
from typing import Literal, assert_never

from cmscale.commands.parser import Output, check_output
from cmscale.config import read_config
from cmscale.config.sections import Checkpoint
from cmscale.errors import UserError
from cmscale.export.card_file import replaceable_card
from cmscale.io.place import Place
from cmscale.io.protocol import Forbidden
from cmscale.io.storage import open_storage
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir
from cmscale.runs.source_kind import CARD, EXPORTED_WEIGHTS

Format = Literal["safetensors", "openai", "diffusers"]
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def check_license(license: str) -> None:
    """Refuses what is no identifier of a licence.

    Raises:
        UserError: it has other characters than the hub's identifiers.
    """
    if not _IDENTIFIER.fullmatch(license):
        raise UserError(f"--license {license}: no identifier of Hugging Face's hub; such are apache-2.0, mit, other")


def copy_settings(folder: Path) -> tuple[Checkpoint, str]:
    """How and where a run copies its checkpoints.

    Raises:
        UserError: the folder is not a run's, or the run has no `checkpoint.export_to`.
    """
    config = RunDir(folder).config
    if not config.is_file():
        raise UserError(f"{folder}: not a run (it has no config.yaml); to export weights, give --to PATH")
    settings = read_config(config, resolved=True).checkpoint
    if settings.export_to is None:
        raise UserError(
            f"{folder}: checkpoint.export_to is not set, nothing to copy; to export weights, give --to PATH"
        )
    return settings, settings.export_to


def is_folder_of(format: Format, to: Place) -> bool:
    """Whether a target of this format is a folder: one that exists, or a name without an ending."""
    if format != "safetensors":
        return format == "diffusers"
    return to.endswith("/") or not Path(to.rpartition("/")[2]).suffix or (not to.is_remote and Path(to).is_dir())


def card_of(format: Format, to: Place) -> Place:
    """Where the model card of an export to `to` is."""
    is_folder = format == "diffusers" or is_folder_of(format, to)
    return Place(open_storage(to).join(CARD) if is_folder else f"{to}.md")


def check_target(format: Format, to: Place) -> None:
    """Checks, before weights are read, that an export can be written to `to`.

    Raises:
        UserError: the file's name has another ending, it may not be written, or a card there was edited.
    """
    match format:
        case "safetensors" if is_folder_of(format, to):
            _check_folder(to, EXPORTED_WEIGHTS)
        case "safetensors":
            _check_file(to, ".safetensors")
        case "openai":
            _check_file(to, ".pt")
        case "diffusers":
            _check_folder(to, "model_index.json")
        case _:
            assert_never(format)
    with contextlib.suppress(Forbidden):  # of a folder `_check_folder` has raised it; a file's card is written first
        replaceable_card(card_of(format, to))


def _check_file(to: Place, suffix: str) -> None:
    """Checks that a file can take an export, and that its card can lie beside it: the card's name is longer."""
    check_output("--to", to, Output((suffix,)))
    if not to.is_remote:
        check_output("--to", Place(f"{to}.md"), Output())


def _check_folder(to: Place, first: str) -> None:
    """Checks that a folder can take an export, whose file `first` is written there."""
    if not to.is_remote and Path(to).is_file():
        raise UserError(f"--to {to}: is a file; name a folder")
    storage = open_storage(to)
    for name in ("config.yaml", CHECKPOINT_MANIFEST):  # with an index beside it, it would be no run any more
        if storage.read_if_present(name) is not None:
            raise UserError(f"--to {to}: is a run, a checkpoint or a data set ({name}); name another folder")
    storage.check_writable(first)
