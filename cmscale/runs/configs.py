"""Reads the config of anything that has one: a config file, a run, a checkpoint, an exported file, a model card."""

from pathlib import Path

from cmscale.commands import situation
from cmscale.config import Config, parse_config, parse_tree, read_config
from cmscale.config.sources import names_file
from cmscale.errors import UserError
from cmscale.io.fetch import local_file
from cmscale.io.json_text import parse_json
from cmscale.io.place import Place
from cmscale.io.reading import read_small
from cmscale.io.storage import open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, step_name
from cmscale.runs.manifests import read_checkpoint_manifest
from cmscale.runs.source_kind import CARD, config_of_card, file_of_weights, kind_of_source

_OF_RUNS = ("provenance.json", "events.jsonl")  # beside a config.yaml that holds every value


def config_of(place: Place, *, kind: str | None = None) -> Config:
    """The config of a file, run, checkpoint, exported file, diffusers folder or model card.

    Args:
        kind: The kind of source that is there, if it is known.

    Raises:
        UserError: there is none, or it can't be read.
    """
    name = place.rstrip("/").lower()
    is_file = not place.is_remote and Path(place).exists() and not Path(place).is_dir()  # also a pipe: <(git show ...)
    if name.endswith((".yaml", ".yml")) or (is_file and not names_file(name) and not name.endswith(".md")):
        file = Path(place) if is_file else local_file(place)
        is_of_run = any((file.parent / beside).exists() for beside in _OF_RUNS)
        return read_config(file, resolved=is_of_run and file.name == "config.yaml")
    if name.endswith(".md"):
        return _of_card(read_small(local_file(place), what="a model card"), origin=place)
    kind = kind or kind_of_source(place)
    storage = open_storage(place)
    match kind:
        case situation.RUN:
            return _of_run(place)
        case situation.CHECKPOINT:
            return _of_checkpoint(place)
        case situation.EXPORTED:
            return _of_exported(place)
        case situation.DIFFUSERS if (card := storage.read_if_present(CARD)) is not None:
            return _of_card(card, origin=storage.join(CARD))
        case _:
            raise UserError(f"{place}: {kind} holds no config; give a config file, a run or an exported file")


def _of_run(place: Place) -> Config:
    storage = open_storage(place)
    text = storage.read_if_present("config.yaml")
    if text is not None:
        return parse_config(text.decode("utf-8", "replace"), origin=storage.join("config.yaml"), resolved=True)
    newest = committed_steps(storage)[-1]  # a run in a storage is its checkpoints
    return _of_checkpoint(Place(storage.join(f"checkpoints/{step_name(newest)}")))


def _of_checkpoint(place: Place) -> Config:
    storage = open_storage(place)
    origin = storage.join(CHECKPOINT_MANIFEST)
    manifest = read_checkpoint_manifest(storage.read_if_present(CHECKPOINT_MANIFEST) or b"", origin=origin)
    return parse_tree(manifest.config, origin=origin)


def _of_exported(place: Place) -> Config:
    """That of a file; of a folder in a storage the card's, as the weights there have gigabytes."""
    storage, file = open_storage(place), file_of_weights(place)
    if file != place and storage.local_path("") is None:
        card = storage.read_if_present(CARD)
        if card is not None and config_of_card(card) is not None:
            return _of_card(card, origin=storage.join(CARD))
    return parse_config(_metadata(local_file(file), origin=file), origin=file, resolved=True)


def _of_card(text: bytes, *, origin: str) -> Config:
    found = config_of_card(text)
    if found is None:
        raise UserError(f"{origin}: holds no config; give the model card of an export of cmscale")
    return parse_config(found, origin=origin, resolved=True)


def _metadata(path: Path, *, origin: str) -> str:
    """The config in the metadata of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            return str(parse_json(file.read(min(size, path.stat().st_size)))["__metadata__"]["config"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{origin}: damaged, or not a safetensors file; copy it again, or give another") from None
