"""Loads a SOURCE of trained weights: a run, a checkpoint, exported weights, or an OpenAI `.pt`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from cmscale.config import Config, Model, differences, leaves, parse_config, read_config
from cmscale.config.added import added_at_older_value, with_added_keys
from cmscale.config.site import read_site
from cmscale.consistency.solver import Denoise
from cmscale.engine.checkpoint_reader import list_checkpoints, read_manifest, read_weights
from cmscale.errors import UserError
from cmscale.interop import read_diffusers, read_openai, read_safetensors
from cmscale.io.fetch import local_file
from cmscale.io.storage import open_storage
from cmscale.model.precondition import denoiser_for
from cmscale.model.unet import build_unet
from cmscale.model.weighting import without_weighting
from cmscale.runs.folder import CHECKPOINT_MANIFEST, step_name
from cmscale.runs.manifests import DatasetManifest, read_dataset_manifest

IMPORTED = "imported"
"""The name of weights that come from another project."""


@dataclass(frozen=True)
class Source:
    """A trained network: its config, its weights (OpenAI's names, float32, on the CPU), and their origin."""

    origin: str
    config: Config
    weights: dict[str, torch.Tensor]
    weights_name: str
    step: int
    run_dir: Path | None = None

    def denoiser(self, device: torch.device) -> Denoise:
        """The network in evaluation mode on a device, with its method's preconditioning."""
        network = build_unet(self.config.model)
        network.load_state_dict(self.weights)
        network.to(device).eval().requires_grad_(False)
        return denoiser_for(self.config.method, network)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and of the method's settings."""
        method = self.config.method
        settings = method.model_dump_json(exclude=added_at_older_value("method", method.model_dump()))
        return hashlib.sha256(f"{settings} {weights_fingerprint(self.weights)}".encode()).hexdigest()

    @property
    def is_imported(self) -> bool:
        """Whether the weights come from another project, so that the config says nothing about their training."""
        return self.weights_name == IMPORTED

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self.config.model.image_size, self.config.model.image_size)


def weights_fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """Hash of named tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dataset_of(source: Source) -> DatasetManifest | None:
    """The manifest of the data that a source was trained on; None if it can't be read any more.

    The config of imported weights says how they are used here, not what they were trained on.
    """
    if source.is_imported:
        return None
    try:
        return read_dataset_manifest(open_storage(source.config.data.path))
    except (UserError, ConnectionError):
        return None


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
        weights: Name of an EMA, or `master` for the weights without averaging; the first EMA by default.
        step: Step of a run's checkpoint; the newest by default.
        config: Config file for weights without one (OpenAI's `.pt`).
        overrides: `key=value` overrides of that file.

    Raises:
        UserError: there is no SOURCE, no such step or weights, or the weights do not fit the config.
    """
    if origin.endswith((".pt", ".pth")):
        if config is None:
            raise UserError(f"{origin}: OpenAI's files hold no config; give --config CONFIG [key=value ...]")
        settings = read_config(config, list(overrides), beneath=[read_site().layer])
        return Source(origin, settings, read_openai(local_file(origin), settings.model), IMPORTED, 0)
    storage = open_storage(origin)
    is_file = origin.endswith(".safetensors")
    is_diffusers = not is_file and storage.read_if_present("model_index.json") is not None
    if is_diffusers and config is not None:
        settings = read_config(config, list(overrides), beneath=[read_site().layer])
        return Source(origin, settings, read_diffusers(storage, model=settings.model)[0], IMPORTED, 0)
    if config is not None or overrides:
        raise UserError(f"--config: {origin} has its own config; leave out --config and key=value")
    if is_file or is_diffusers:
        state, card = read_safetensors(local_file(origin)) if is_file else read_diffusers(storage)
        if not card:
            raise UserError(f"{origin}: holds no config; give --config CONFIG [key=value ...]")
        settings = parse_config(card["config"], origin=origin, resolved=True)
        return Source(origin, settings, state, card["weights"], int(card["step"]))
    if storage.read_if_present(CHECKPOINT_MANIFEST) is not None:
        return _read_checkpoint(origin, weights=weights, run_dir=None)
    return _read_run(origin, weights=weights, step=step)


def load_teacher(config: Config) -> dict[str, torch.Tensor]:
    """Weights of the diffusion model `method.teacher`; an OpenAI `.pt` is read with the config's model section.

    Raises:
        UserError: it is not a diffusion model, or another network.
    """
    setting = config.method.teacher_choice
    assert setting is not None, f"{config.method.kind} has no teacher"
    if setting.source.endswith((".pt", ".pth")):
        if config.method.embeds_angle:
            raise UserError(f"method.teacher: {setting.source} embeds log_sigma; leave out teacher_time_embedding")
        return read_openai(local_file(setting.source), config.model)
    teacher = load_source(setting.source, weights=setting.weights_name)
    if not teacher.config.method.facts.can_teach:
        kind = teacher.config.method.kind
        raise UserError(f"method.teacher: {setting.source} has method.kind {kind}; give a diffusion model (edm)")
    if teacher.config.method.embeds_angle != config.method.embeds_angle:
        its, ours = (("log_sigma", "angle")[each.embeds_angle] for each in (teacher.config.method, config.method))
        raise UserError(
            f"method.teacher: the network of {setting.source} embeds {its}, this config's embeds {ours}; set "
            f"method.teacher_time_embedding={its} (sct, scd only), or give another teacher"
        )
    if different := differences(network_settings(teacher.config.model), network_settings(config.model)):
        raise UserError(
            f"method.teacher: {setting.source} is another network ({'; '.join(different)}); "
            "change the model section to the teacher's"
        )
    return teacher.weights


def network_settings(model: Model) -> dict[str, object]:
    """The settings that must be equal for one network to start from the weights of another."""
    return {f"model.{key}": value for key, value, operational in leaves(model) if not operational and key != "dropout"}


def _read_run(origin: str, *, weights: str | None, step: int | None) -> Source:
    storage = open_storage(origin)
    steps = [listed.step for listed in list_checkpoints(origin)]
    if not steps:
        raise UserError(f"{origin}: no run, checkpoint or exported weights; give a SOURCE with a complete checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"{origin}: no checkpoint of step {step}; choose from {', '.join(map(str, steps))}")
    url = storage.join(f"checkpoints/{step_name(steps[-1] if step is None else step)}")
    return _read_checkpoint(url, weights=weights, run_dir=storage.local_path(""))


def _read_checkpoint(origin: str, *, weights: str | None, run_dir: Path | None) -> Source:
    storage = open_storage(origin)
    manifest = read_manifest(storage)
    settings = Config.model_validate_json(json.dumps(with_added_keys(manifest.config)))
    name = weights or settings.ema.names[0]
    if name not in manifest.quantities:
        known = [quantity for quantity in manifest.quantities if not quantity.startswith("exp_avg")]
        raise UserError(f"{origin}: no weights {name!r}; choose from {', '.join(known)}")
    folder = storage.local_path("")
    if run_dir is None and folder is not None and folder.parent.name == "checkpoints":
        run_dir = folder.parent.parent
    return Source(origin, settings, without_weighting(read_weights(origin, name)), name, manifest.state.step, run_dir)


def checkpoint_step(text: str) -> int | None:
    """The step that `--step` names; None for the newest checkpoint.

    Raises:
        UserError: neither a number nor `latest`.
    """
    if text == "latest":
        return None
    if not text.isdecimal():
        raise UserError(f"--step {text}: give a step number or latest")
    return int(text)
