"""Reads keys under the names that they had in older configs."""

from typing import Any

RENAMED = {
    "slurm.max_restarts": "restart.max_restarts",
    "slurm.backoff_seconds": "restart.backoff_seconds",
    "slurm.signal_seconds": "restart.signal_seconds",
}
"""Old dotted key -> current one."""


def with_current_names(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Moves values from old keys to the current ones.

    Args:
        tree: A config as read from a file: sections by name, values by key. It is not changed.

    Returns:
        The tree with current keys, and the old keys that it held.

    Raises:
        ValueError: an old key and its current name are both given.
    """
    found = [key for key in RENAMED if _holds(tree, key)]
    if not found:
        return tree, found
    moved = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for old in found:
        new = RENAMED[old]
        if _holds(tree, new):
            raise ValueError(f"{old} is the old name of {new}, and both are given; remove {old}")
        section, leaf = new.split(".")
        old_section, old_leaf = old.split(".")
        if moved.get(section) is None:
            moved[section] = {}
        moved[section][leaf] = moved[old_section].pop(old_leaf)
    return moved, found


def _holds(tree: dict[str, Any], key: str) -> bool:
    section, leaf = key.split(".")
    return isinstance(tree.get(section), dict) and leaf in tree[section]
