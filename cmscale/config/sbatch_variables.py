"""Reads what the user told sbatch by variables SBATCH_*, as values of the section `slurm`."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cmscale.config.layers import Layer
from cmscale.config.mistakes import explain, refusal
from cmscale.config.slurm import Slurm

# Variables that sbatch reads, and the keys that say the same.
_KEYS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_EXCLUSIVE": "exclusive",
    "SBATCH_GPUS_PER_NODE": "gpus_per_node",
    "SBATCH_GRES": "gres",
    "SBATCH_MEM_PER_CPU": "mem_per_cpu",
    "SBATCH_MEM_PER_GPU": "mem_per_gpu",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_WCKEY": "wckey",
}
_EXTRA = (
    *("acctg-freq", "batch", "clusters", "container", "container-id", "core-spec", "delay-boot", "distribution"),
    *("gpu-bind", "gpu-freq", "gres-flags", "hint", "mem-bind", "network", "power", "profile", "segment"),
    *("thread-spec", "threads-per-core", "tres-bind"),
)
_EXTRA_WITHOUT_VALUE = ("no-kill", "overcommit", "spread-job", "use-min-nodes")
# What they would say is the launcher's to say, or must not be said by chance.
_WITHOUT_NOTICE = frozenset({"SBATCH_DEBUG", "SBATCH_IGNORE_PBS", "SBATCH_WAIT4SWITCH"})


def environment_layers(environment: Mapping[str, str]) -> list[Layer]:
    """A layer per variable by which the user told sbatch something, so that it holds at every restart, too.

    Raises:
        UserError: a value is not allowed.
    """
    layers = []
    for name in sorted(environment):
        key, value = _said_by(name, environment)
        if key is None:
            continue
        values = {"extra": {key.removeprefix("extra."): value}} if key.startswith("extra.") else {key: value}
        try:
            Slurm.model_validate(values)
        except ValidationError as error:
            raise refusal(explain(error, section="slurm"), lambda _, name=name: name) from None
        layers.append(Layer(name, {"slurm": values}))
    return layers


def _said_by(name: str, environment: Mapping[str, str]) -> tuple[str | None, Any]:
    """The key of `slurm` that a variable sets, and its value; None for one that says nothing here."""
    value = environment[name]
    if name == "SLURM_CLUSTERS" and "SLURM_JOB_ID" not in environment:
        return "extra.clusters", value
    if not name.startswith("SBATCH_"):
        return None, None
    if name in _KEYS:
        if name == "SBATCH_EXCLUSIVE" and value not in ("user", "mcs", "topo"):
            return "exclusive", True
        return (_KEYS[name], value) if value else (None, None)
    if name == "SBATCH_REQ_SWITCH" and value:
        wait = environment.get("SBATCH_WAIT4SWITCH")
        return "extra.switches", f"{value}@{wait}" if wait else value
    option = name.removeprefix("SBATCH_").lower().replace("_", "-")
    if option in _EXTRA_WITHOUT_VALUE:
        return f"extra.{option}", True
    return (f"extra.{option}", value) if option in _EXTRA and value else (None, None)


def unused_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables of sbatch that are set and not used."""
    names = sorted(name for name in environment if name.startswith("SBATCH_") and name not in _WITHOUT_NOTICE)
    return [name for name in names if environment[name] and _said_by(name, environment)[0] is None]
