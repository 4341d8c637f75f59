"""Loads a SOURCE of trained weights: a run, a checkpoint, exported weights, or another project's file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from cmscale.commands import situation
from cmscale.config import Config, parse_config, parse_tree, read_config
from cmscale.config.added import added_at_older_value
from cmscale.config.agreement import (
    check_foreign_teacher,
    check_openai_teacher,
    check_openai_weights,
    check_teacher,
    check_weights,
)
from cmscale.config.averages import length_of
from cmscale.config.sampling_times import parse_step
from cmscale.config.site import read_site
from cmscale.config.sources import is_nvlabs, is_openai, is_safetensors, refuse_hub_name
from cmscale.consistency.solver import Denoise
from cmscale.engine.checkpoint_reader import by_name, list_checkpoints, read_manifest, read_weights
from cmscale.engine.power_averages import reconstructed
from cmscale.errors import UserError
from cmscale.interop import holds_config, parameter_shapes, read_diffusers, read_nvlabs, read_openai, read_safetensors
from cmscale.interop.strict import strict_weights
from cmscale.io.fetch import local_file
from cmscale.io.storage import open_storage
from cmscale.model.attention_choice import choose
from cmscale.model.precondition import denoiser_for
from cmscale.model.unet import build_unet
from cmscale.model.weighting import without_weighting
from cmscale.runs.folder import CHECKPOINT_MANIFEST, step_name, step_of
from cmscale.runs.manifests import CheckpointManifest, DatasetManifest, read_dataset_manifest
from cmscale.runs.source_kind import file_of_weights, kind_of_source

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
        attention = choose(self.config.model, device, torch.float32).kind
        network = build_unet(self.config.model.model_copy(update={"attention": attention}))
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
        """(channels, height, width) of a sample."""
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
        held = _read_foreign(file_of_weights(origin) if kind == situation.BARE else origin, settings)
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


def _read_foreign(origin: str, config: Config) -> dict[str, torch.Tensor]:
    """Weights that hold no config, in any format of other projects.

    Raises:
        UserError: they do not fit the config.
    """
    if is_openai(origin):
        return read_openai(local_file(origin), config.model)
    if is_nvlabs(origin):
        return _read_edm(origin, config, key=origin)
    if is_safetensors(origin):
        return read_safetensors(local_file(origin), model=config.model)[0]
    return read_diffusers(open_storage(origin), model=config.model, method=config.method)[0]


def _read_edm(origin: str, config: Config, *, key: str) -> dict[str, torch.Tensor]:
    """The diffusion model in a pickle of NVlabs' EDM; its network is the config's.

    Args:
        key: What names it, for messages.
    """
    found = read_nvlabs(local_file(origin), config.model)
    if found.sigma_data != config.method.sigma_data:
        raise UserError(
            f"{key}: {origin} was trained with method.sigma_data {found.sigma_data:g}, this config has "
            f"{config.method.sigma_data:g}; set method.sigma_data={found.sigma_data:g}, or give other weights"
        )
    return found.weights


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
    found = [origin] if kind == situation.CHECKPOINT else [_checkpoint_url(origin, step) for step in steps]
    for url in found:
        manifest = read_manifest(open_storage(url))
        for name in weights:
            if name is not None:
                _check_weights(url, manifest, name)


def _check_weights(origin: str, manifest: CheckpointManifest, name: str) -> None:
    if length_of(name) is not None and any(length_of(quantity) for quantity in manifest.quantities):
        return
    if name not in manifest.quantities or name.startswith("exp_avg"):
        known = [quantity for quantity in manifest.quantities if not quantity.startswith("exp_avg")]
        raise UserError(f"{origin}: no weights {name!r}; choose from {', '.join(known)}")


def load_teacher(config: Config) -> dict[str, torch.Tensor]:
    """Weights of the diffusion model `method.teacher`; a file without a config is read with this one's model section.

    Raises:
        UserError: it is not a diffusion model, another network, or one that can't teach this config's student.
    """
    setting = config.method.teacher_choice
    assert setting is not None, f"{config.method.kind} has no teacher"
    origin = setting.source
    if is_nvlabs(origin):
        check_foreign_teacher(config.method, origin=origin)
        if config.method.embeds_angle:
            raise UserError(f"method.teacher: {origin} embeds log_sigma; leave out teacher_time_embedding")
        if setting.weights_name is not None:
            raise UserError(f"method.teacher_weights: {setting.weights_name}, but {origin} holds one set; leave it out")
        return _read_edm(origin, config, key="method.teacher")
    if is_openai(origin):
        check_openai_teacher(config)
        return read_openai(local_file(origin), config.model)
    teacher = load_source(origin, weights=setting.weights_name)
    if setting.weights_name not in (None, teacher.weights_name):
        raise UserError(
            f"method.teacher_weights: {setting.weights_name}, but {origin} holds {teacher.weights_name}; leave it out"
        )
    check_teacher(teacher.config, config, origin=origin)
    return teacher.weights


def load_first_weights(config: Config) -> dict[str, torch.Tensor]:
    """The weights that `train.init_from` names; those without a config are read with this config's model section.

    Raises:
        UserError: they are not those of this config's network.
    """
    origin, named, key = config.train.init_from, config.train.init_weights, "train.init_from"
    assert origin is not None
    if is_nvlabs(origin) and named is None and not config.method.embeds_angle:
        return _read_edm(origin, config, key=key)
    if is_openai(origin) or is_nvlabs(origin):
        check_openai_weights(config, key=key, origin=origin, named=named)
        return _read_foreign(origin, config)
    if not is_safetensors(origin) and (storage := open_storage(origin)).read_if_present("model_index.json"):
        weights, card = read_diffusers(storage, model=config.model)
        if not card:
            check_openai_weights(config, key=key, origin=origin, named=named)
            return weights
    source = load_source(origin, weights=named)
    if named not in (None, source.weights_name):
        raise UserError(f"train.init_weights: {named}, but {origin} holds {source.weights_name}; leave it out")
    check_weights(source.config, config, key=key, origin=origin)
    return source.weights


def _read_run(origin: str, *, weights: str | None, step: int | None) -> Source:
    url = _checkpoint_url(origin, step)
    return _read_checkpoint(url, weights=weights, run_dir=open_storage(origin).local_path(""))


def newest_step(run: str) -> int:
    """The step of a run's newest checkpoint.

    Raises:
        UserError: it has none.
    """
    return step_of(_checkpoint_url(run, None).rpartition("/")[2])


def _checkpoint_url(run: str, step: int | None) -> str:
    """The checkpoint of a step of a run; the newest for None."""
    storage = open_storage(run)
    steps = [listed.step for listed in list_checkpoints(run)]
    if not steps:
        raise UserError(f"{run}: the run has no complete checkpoint yet; wait for its first, or give another SOURCE")
    if step is not None and step not in steps:
        raise UserError(f"{run}: no checkpoint of step {step}; choose from {', '.join(map(str, steps))}")
    return storage.join(f"checkpoints/{step_name(steps[-1] if step is None else step)}")


def _read_checkpoint(origin: str, *, weights: str | None, run_dir: Path | None) -> Source:
    storage = open_storage(origin)
    manifest = read_manifest(storage)
    settings = parse_tree(manifest.config, origin=storage.join(CHECKPOINT_MANIFEST))
    name = settings.ema.names[0] if weights is None else weights
    _check_weights(origin, manifest, name)
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


def checkpoint_step(text: str) -> int | None:
    """The step that `--checkpoint` names; None for the newest checkpoint.

    Raises:
        UserError: neither a number nor `latest`.
    """
    try:
        return parse_step(text)
    except ValueError as error:
        raise UserError(f"--checkpoint: {error}") from None
