"""Defines the config of a run: its sections, what holds between them, and which values change the losses."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from cmscale.config.added import with_added_values
from cmscale.config.averages import EMA
from cmscale.config.evaluate import Evaluate
from cmscale.config.methods import Method
from cmscale.config.mirrors import Prometheus, Tensorboard, Wandb
from cmscale.config.network import Model
from cmscale.config.renamed import with_current_names
from cmscale.config.section import Section
from cmscale.config.sections import (
    Checkpoint,
    Data,
    Engine,
    Optimizer,
    Restart,
    Sampling,
    Train,
)
from cmscale.config.slurm import Slurm
from cmscale.config.storage import StorageKeys
from cmscale.errors import UserError
from cmscale.io.json_text import parse_json


class Config(Section):
    """The config of a run."""

    method: Method
    model: Model
    data: Data
    optimizer: Optimizer
    train: Train
    ema: EMA = EMA()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    sampling: Sampling = Sampling()
    evaluate: Evaluate = Evaluate()
    wandb: Wandb = Wandb()
    tensorboard: Tensorboard = Tensorboard()
    prometheus: Prometheus = Prometheus()
    restart: Restart = Restart()
    slurm: Slurm = Slurm()
    storage: StorageKeys = StorageKeys()

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, given: Any) -> Any:
        """Every reader passes here: files, manifests of checkpoints, cards of exported weights."""
        return with_current_names(given)[0] if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        kind, facts = self.method.kind, self.method.facts
        if self.train.consistency_error_every and not facts.is_consistency_model:
            raise ValueError(
                f"train.consistency_error_every: method.kind {kind} has no consistency function; set it to 0"
            )
        if self.sampling.times is not None and facts.sampler != "multistep":
            raise ValueError(f"sampling.times: method.kind {kind} is not sampled in chosen steps; leave it out")
        low, high = self.method.sigma_min, self.method.sigma_max
        if outside := next((time for time in self.sampling.times or () if not low <= time <= high), None):
            raise ValueError(
                f"sampling.times: {outside:g} is outside of method.sigma_min {low:g} to sigma_max {high:g}"
            )
        if self.train.init_weights is not None and self.train.init_from is None:
            raise ValueError("train.init_weights: is set, but train.init_from is not; set both or neither")
        if self.method.needs_first_weights and self.method.teacher_choice is None and self.train.init_from is None:
            raise ValueError(
                f"method.teacher: method.kind {kind} starts with trained weights; set it to a diffusion model, or "
                "train.init_from to other weights"
            )
        if self.train.init_from is not None and self.method.teacher_choice is not None and not facts.follows_teacher:
            raise ValueError(
                f"train.init_from: method.kind {kind} starts with the weights of method.teacher; leave out one of them"
            )
        if self.ema.lengths and self.method.restarts_averages:
            raise ValueError(f"ema.lengths: method.kind {kind} starts its averages again in each stage; leave it out")
        if self.ema.snapshot_every % self.checkpoint.every_steps:
            raise ValueError(
                f"ema.snapshot_every: {self.ema.snapshot_every} is not a multiple of checkpoint.every_steps, "
                f"{self.checkpoint.every_steps}; snapshots are written with checkpoints"
            )
        if self.engine.zero_stage == 3 and self.method.needs_forward_mode:
            raise ValueError(
                f"engine.zero_stage: 3 can't be combined with the forward-mode derivatives of method.kind {kind}; use 2"
            )
        if self.engine.zero_stage == 3 and self.engine.parameters == "joined":
            raise ValueError("engine.parameters: joined can't be combined with engine.zero_stage 3; use separate, or 2")
        if self.model.compile != "off" and self.method.needs_forward_mode:
            raise ValueError(
                f"model.compile: {self.model.compile} can't be combined with the forward-mode derivatives of "
                f"method.kind {kind}; use off, or method.tangent backward_differences"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> "Config":
        """Reads a config file, and applies `section.key=value` overrides.

        Raises:
            UserError: there is no such file, it is not YAML, or a key or value is not allowed.
        """
        from cmscale.config.files import read_config  # it imports this module

        if not isinstance(path, (str, os.PathLike)):
            raise UserError(f"path: got {path!r}; give the path of a config file")
        if wrong := [each for each in overrides if not isinstance(each, str)]:
            raise UserError(f"overrides: got {wrong[0]!r}; give each one as a string, section.key=value")
        return read_config(path, list(overrides))

    def fingerprint(self) -> str:
        """Hash of the values that change the losses; a checkpoint resumes only under an equal fingerprint."""
        text = json.dumps(trajectory(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def accumulation_steps(config: Config, *, num_ranks: int) -> int:
    """Micro-batches per rank and step: global_batch_size / (num_ranks x micro_batch_size).

    Raises:
        UserError: global_batch_size is not divisible by num_ranks x micro_batch_size.
    """
    per_pass = num_ranks * config.train.micro_batch_size
    if config.train.global_batch_size % per_pass:
        raise UserError(
            f"train.global_batch_size: {config.train.global_batch_size} is not divisible by {num_ranks} ranks "
            f"x train.micro_batch_size {config.train.micro_batch_size} = {per_pass}; change one of the three"
        )
    return config.train.global_batch_size // per_pass


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yields (dotted key, value, whether it is operational) for every leaf of a config."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra
            yield f"{prefix}{name}", value, isinstance(extra, dict) and bool(extra.get("operational"))


def trajectory(config: Config) -> dict[str, Any]:
    """The values that change the losses, by dotted key.

    train.total_steps is none of them: what it changes is the length of schedules that have no length of their own.
    """
    kept = {key: value for key, value, is_operational in leaves(config) if not is_operational}
    total = kept.pop("train.total_steps")
    if config.method.facts.depends_on_total_steps:
        kept["method.schedule_steps"] = config.method.schedule_length(total)
    if config.optimizer.schedule == "cosine":
        kept["optimizer.decay_reference"] = config.optimizer.decay_reference or total
    return parse_json(json.dumps(kept))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per key in which two `trajectory` dictionaries differ; `old` may be of an older release."""
    return unequal(with_added_values(old), new)


def unequal(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per key in which two dictionaries differ."""
    keys = sorted(old.keys() | new.keys())
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in keys
        if old.get(key, "not set") != new.get(key, "not set")
    ]
