"""Gives keys that were added to the config later the value that older releases worked with.

The resolved config of a run and the manifests of its checkpoints hold every key of their release. A key that is
missing there did not exist yet; its default now may differ from what the run was trained with.
"""

from typing import Any

from cmscale.config.methods import KINDS

ADDED: dict[str, dict[str, Any]] = {
    "method.time_embedding": {"edm": "log_sigma"},
    "method.tangent": {"sct": "jvp", "scd": "jvp"},
    "method.teacher_time_embedding": {"sct": "log_sigma", "scd": "log_sigma"},
    "model.noise_embedding_scale": dict.fromkeys(KINDS, 1000.0),
}
"""Dotted key -> `method.kind` -> what releases without the key did."""


def with_added_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's config as nested sections, with the keys that its release did not have. The tree is not changed."""
    method = tree.get("method")
    kind = method.get("kind") if isinstance(method, dict) else None
    kind = kind if isinstance(kind, str) else None
    filled = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for key, values in ADDED.items():
        section, leaf = key.split(".")
        if kind in values and isinstance(filled.get(section), dict):
            filled[section].setdefault(leaf, values[kind])
    return filled


def with_added_values(trajectory: dict[str, Any]) -> dict[str, Any]:
    """The same for values by dotted key, as `trajectory` gives them."""
    kind = trajectory.get("method.kind")
    added = {key: values[kind] for key, values in ADDED.items() if kind in values}
    return added | trajectory


def added_at_older_value(section: str, values: dict[str, Any]) -> set[str]:
    """The added keys of a section that have their older value: without them the hashes of old runs stay."""
    kind = str(values.get("kind"))
    return {leaf for leaf, value in values.items() if ADDED.get(f"{section}.{leaf}", {}).get(kind) == value}
