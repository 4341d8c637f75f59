"""Owns the export command: a source's weights in a format that others load, with a card that says what they are."""

import json
from pathlib import Path
from typing import Any, Literal

from cmscale.config import read_config
from cmscale.engine.export import export_pending
from cmscale.errors import UserError
from cmscale.interop import model_card, write_diffusers, write_openai, write_safetensors
from cmscale.io.storage import open_parent
from cmscale.runs.folder import RunDir
from cmscale.source import Source, dataset_of

Format = Literal["safetensors", "openai", "diffusers"]


def export_weights(source: Source, *, format: Format, to: str) -> None:
    """Writes the weights to a path or `s3://`: a file and a card beside it, or a diffusers folder with the card in it.

    Raises:
        UserError: the format can't express the network, no room, not allowed to write, or a file of the wrong name.
    """
    card = model_card(
        source.config,
        step=source.step,
        weights_name=source.weights_name,
        dataset=dataset_of(source),
        evaluations=_evaluations(source),
    )
    match format:
        case "safetensors":
            _must_end(to, ".safetensors")
            write_safetensors(
                to, source.weights, config=source.config, step=source.step, weights_name=source.weights_name
            )
        case "openai":
            _must_end(to, ".pt")
            write_openai(to, source.weights, model=source.config.model)
        case "diffusers":
            write_diffusers(
                to, source.weights, config=source.config, step=source.step, weights_name=source.weights_name, card=card
            )
            return
    storage, name = open_parent(to)
    storage.write(f"{name}.md", card.encode())


def finish_copies(folder: Path) -> list[int]:
    """Copies the checkpoints of a run that its `checkpoint.export_to` still lacks. Returns their steps.

    Raises:
        UserError: not a run's folder, or a run that exports nowhere.
    """
    run = RunDir(folder)
    if not run.config.is_file():
        raise UserError(f"{folder}: not a run (no config.yaml); without --to, the copies of a run are finished")
    export_to = read_config(run.config).checkpoint.export_to
    if export_to is None:
        raise UserError(f"{folder}: checkpoint.export_to is not set, nothing is copied; say --to PATH for its weights")
    return export_pending(RunDir(folder.absolute()), export_to)


def _must_end(to: str, ending: str) -> None:
    if not to.endswith(ending):
        raise UserError(f"--to {to}: the file's name must end in {ending}, or no command would know it again")


def _evaluations(source: Source) -> list[dict[str, Any]]:
    if source.run_dir is None:
        return []
    return [json.loads(path.read_text()) for path in sorted(RunDir(source.run_dir).evaluations.glob("*.json"))]
