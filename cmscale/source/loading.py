"""Loads a SOURCE of trained weights: a run, a checkpoint, exported weights, or another project's file."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cmscale.commands import situation
from cmscale.config import parse_config, parse_tree, read_config
from cmscale.config.averages import length_of
from cmscale.config.site import read_site
from cmscale.config.sources import refuse_hub_name
from cmscale.engine.checkpoint_reader import by_name, read_manifest, read_weights
from cmscale.engine.power_averages import reconstructed
from cmscale.errors import UserError
from cmscale.interop import holds_config, parameter_shapes, read_diffusers, read_safetensors
from cmscale.interop.strict import strict_weights
from cmscale.io.fetch import local_file
from cmscale.io.storage import open_storage
from cmscale.model.weighting import without_weighting
from cmscale.runs.folder import CHECKPOINT_MANIFEST, step_name
from cmscale.runs.manifests import CheckpointManifest
from cmscale.runs.source_kind import file_of_weights
from cmscale.source.choices import check_weights_name, checkpoint_url, model_kind
from cmscale.source.foreign import read_foreign
from cmscale.source.source import IMPORTED, Source


def load_source(
    origin: str,
    *,
    weights: str | None = None,
    step: int | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> Source:
    """Reads a SOURCE (local path or `s3://`).

    Args:
        weights: Name of an EMA, or `master` for the weights without averaging; the first EMA by default. Of a run that
            keeps averages by a power function also `power_LENGTH`, with any length.
        step: Step of a run's checkpoint; the newest by default.
        config: Config file for weights without one: OpenAI's `.pt`, NVlabs' `.pkl`, foreign safetensors and diffusers
            folders.
        overrides: `key=value` overrides of that file.

    Raises:
        UserError: there is no SOURCE, no such step or weights, or the weights do not fit the config.
    """
    refuse_hub_name(origin)
    kind = model_kind(origin)
    own = kind not in situation.WITHOUT_CONFIG or (kind == situation.DIFFUSERS and holds_config(open_storage(origin)))
    if (config is not None or overrides) and (own or config is None):
        raise UserError(f"--config: {origin} has its own config; leave out --config and key=value")
    if config is not None:
        settings = read_config(config, list(overrides), beneath=[read_site().layer])
        held = read_foreign(file_of_weights(origin) if kind == situation.BARE else origin, settings)
        return Source(origin, settings, held, IMPORTED, 0)
    if kind in situation.WITHOUT_ANY_CONFIG:
        raise UserError(f"{origin}: holds weights without a config; give --config CONFIG [key=value ...]")
    if kind in (situation.EXPORTED, situation.DIFFUSERS):
        is_folder = kind == situation.DIFFUSERS
        file = origin if is_folder else file_of_weights(origin)
        state, card = read_diffusers(open_storage(file)) if is_folder else read_safetensors(local_file(file))
        settings = parse_config(card["config"], origin=file, resolved=True)
        return Source(origin, settings, state, card["weights"], int(card["step"]))
    if kind == situation.CHECKPOINT:
        return _read_checkpoint(origin, weights=weights, run_dir=None)
    return _read_run(origin, weights=weights, step=step)


def _read_run(origin: str, *, weights: str | None, step: int | None) -> Source:
    url = checkpoint_url(origin, step)
    return _read_checkpoint(url, weights=weights, run_dir=open_storage(origin).local_path(""))


def _read_checkpoint(origin: str, *, weights: str | None, run_dir: Path | None) -> Source:
    storage = open_storage(origin)
    manifest = read_manifest(storage)
    settings = parse_tree(manifest.config, origin=storage.join(CHECKPOINT_MANIFEST))
    name = settings.ema.names[0] if weights is None else weights
    check_weights_name(origin, manifest, name)
    folder = storage.local_path("")
    if run_dir is None and folder is not None and folder.parent.name == "checkpoints":
        run_dir = folder.parent.parent
    held = strict_weights(
        without_weighting(_read_or_reconstruct(origin, name, manifest)),
        parameter_shapes(settings.model),
        origin=storage.url,
    )
    return Source(origin, settings, held, name, manifest.state.step, run_dir)


def _read_or_reconstruct(origin: str, name: str, manifest: CheckpointManifest) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by name; an average by a power function that it does not hold is computed."""
    length = length_of(name)
    if length is None or name in manifest.quantities:
        return read_weights(origin, name)
    run, _, folder = origin.rstrip("/").rpartition("/checkpoints/")
    if not run or folder != step_name(manifest.state.step):
        raise UserError(f"{origin}: {name} is computed from all checkpoints of a run; give the run and --checkpoint")
    return by_name(reconstructed(run, length, step=manifest.state.step), manifest.parameters)
