"""The config of a run: its sections, and reading them from YAML and `key=value` overrides."""

from cmscale.config.evaluate import Evaluate
from cmscale.config.files import dump_config, parse_config, parse_tree, read_config
from cmscale.config.keys import known_keys
from cmscale.config.methods import CD, CT, ECT, EDM, ICT, MCD, PD, SCD, SCT, TCM, Method, MethodSection
from cmscale.config.mirrors import Prometheus, Tensorboard, Wandb
from cmscale.config.models import Config, accumulation_steps, differences, leaves, trajectory, unequal
from cmscale.config.network import NOISE_EMBEDDING_SCALE, Model
from cmscale.config.schema import json_schema
from cmscale.config.sections import Data, Optimizer, Restart, Sampling
from cmscale.config.slurm import Slurm
from cmscale.config.yaml_text import parse_yaml

__all__ = [
    "CD",
    "CT",
    "ECT",
    "EDM",
    "ICT",
    "MCD",
    "NOISE_EMBEDDING_SCALE",
    "PD",
    "SCD",
    "SCT",
    "TCM",
    "Config",
    "Data",
    "Evaluate",
    "Method",
    "MethodSection",
    "Model",
    "Optimizer",
    "Prometheus",
    "Restart",
    "Sampling",
    "Slurm",
    "Tensorboard",
    "Wandb",
    "accumulation_steps",
    "differences",
    "dump_config",
    "json_schema",
    "known_keys",
    "leaves",
    "parse_config",
    "parse_tree",
    "parse_yaml",
    "read_config",
    "trajectory",
    "unequal",
]
