"""The config of a run: its sections, and reading them from YAML and `key=value` overrides."""

from cmscale.config.files import dump_config, json_schema, known_keys, parse_config, read_config
from cmscale.config.methods import CD, CT, ECT, EDM, ICT, PD, SCD, SCT, Method, MethodSection
from cmscale.config.models import (
    Config,
    Data,
    Evaluate,
    Model,
    Optimizer,
    Restart,
    Slurm,
    Wandb,
    accumulation_steps,
    differences,
    leaves,
    trajectory,
)

__all__ = [
    "CD",
    "CT",
    "ECT",
    "EDM",
    "ICT",
    "PD",
    "SCD",
    "SCT",
    "Config",
    "Data",
    "Evaluate",
    "Method",
    "MethodSection",
    "Model",
    "Optimizer",
    "Restart",
    "Slurm",
    "Wandb",
    "accumulation_steps",
    "differences",
    "dump_config",
    "json_schema",
    "known_keys",
    "leaves",
    "parse_config",
    "read_config",
    "trajectory",
]
