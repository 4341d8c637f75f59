"""Gives keys that were added to the config later the value that older releases worked with.

The resolved config of a run and the manifests of its checkpoints hold every key of their release. A key that is
missing there did not exist yet; its default now may differ from what the run was trained with.
"""

from typing import Any

EVERY_METHOD = "*"

SCHEDULE_LENGTHS = ("method.schedule_steps", "optimizer.decay_reference")
"""Keys whose null means train.total_steps, where the schedule is used."""

ADDED: dict[str, dict[str, Any]] = {
    "method.time_embedding": {"edm": "log_sigma"},
    "method.tangent": {"sct": "jvp", "scd": "jvp"},
    "method.teacher_time_embedding": {"sct": "log_sigma", "scd": "log_sigma"},
    "method.weighting": {"ect": "inverse_gap"},
    "method.schedule_steps": {"ct": None, "ict": None, "ect": None, "pd": None},
    "method.lpips_precision": {"cd": "fp32", "ct": "fp32", "pd": "fp32", "mcd": "fp32"},
    "model.noise_embedding_scale": {EVERY_METHOD: 1000.0},
    "model.dropout_resolutions": {EVERY_METHOD: None},
    "model.precision_layout": {EVERY_METHOD: "uniform"},
    "train.random_numbers": {EVERY_METHOD: "torch"},
    "ema.lengths": {EVERY_METHOD: []},
    "optimizer.schedule": {EVERY_METHOD: "constant"},
    "optimizer.decay_reference": {EVERY_METHOD: None},
    "optimizer.decay_steps": {EVERY_METHOD: []},
    "optimizer.decay_factor": {EVERY_METHOD: None},
}
"""Dotted key -> `method.kind`, or `EVERY_METHOD` -> what releases without the key did, as JSON has it."""


def _of_method(kind: str | None) -> dict[str, Any]:
    """Dotted key -> older value, for a run of this method."""
    found = {}
    for key, values in ADDED.items():
        for named in (kind, EVERY_METHOD):
            if named in values:
                found[key] = values[named]
    return found


def with_added_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's config as nested sections, with the keys that its release did not have. The tree is not changed."""
    method = tree.get("method")
    kind = method.get("kind") if isinstance(method, dict) else None
    filled = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for key, value in _of_method(kind if isinstance(kind, str) else None).items():
        section, leaf = key.split(".")
        if isinstance(filled.get(section), dict):
            filled[section].setdefault(leaf, value)
    return filled


def with_added_values(trajectory: dict[str, Any]) -> dict[str, Any]:
    """The same for values by dotted key, as `trajectory` gives them.

    Older releases have train.total_steps among them, where it is the length of a schedule.
    """
    filled = _of_method(trajectory.get("method.kind")) | trajectory
    if (total := filled.pop("train.total_steps", None)) is not None:
        lengths = ["method.schedule_steps"] if "method.schedule_steps" in filled else []
        if filled.get("optimizer.schedule") == "cosine":
            lengths.append("optimizer.decay_reference")
        for key in lengths or ["method.schedule_steps"]:  # a method of another project has the schedule
            filled[key] = filled.get(key) or total
    return filled


def added_at_older_value(section: str, values: dict[str, Any]) -> set[str]:
    """The added keys of a section that have their older value: without them the hashes of old runs stay.

    Args:
        values: The section's values; those of `method` with its `kind`.
    """
    older = _of_method(values.get("kind"))
    return {leaf for leaf, value in values.items() if (key := f"{section}.{leaf}") in older and older[key] == value}
