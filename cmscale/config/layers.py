"""Lays values over one another: a site's defaults, the environment, a config's file, the command line.

Each value keeps its origin, so that `--dry-run` can say where it came from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmscale.config.slurm import MEMORY

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Layer:
    """Values by section and key, and where they come from, in words; of a file also their lines by dotted key."""

    origin: str
    tree: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)


def merged(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of several layers, those of later ones over those of earlier ones.

    Returns:
        The merged sections, and the origin of each value by dotted key.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for section, given in layer.tree.items():
            values = _copied(given)
            target = tree.get(section)
            if values is None and target is not None:
                continue
            if not isinstance(values, Mapping) or not isinstance(target, dict):
                tree[section] = target = values
            else:
                make_room(target, section, values)
                for key, value in values.items():
                    is_partial = isinstance(value, Mapping) and isinstance(target.get(key), Mapping)
                    target[key] = {**target[key], **value} if is_partial else value
            if isinstance(values, Mapping):
                origins |= dict.fromkeys(_names(section, values), layer.origin)
    return tree, origins


def _copied(values: Any) -> Any:
    """A section's values, so that what is laid over them changes no layer: a site's is read once per process."""
    if not isinstance(values, Mapping):
        return values
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _names(section: str, values: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys of a section's values; values that have names of their own count one by one."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from (f"{section}.{key}.{name}" for name in value)
        else:
            yield f"{section}.{key}"


def make_room(target: dict[str, Any], section: str, values: Mapping[str, Any]) -> None:
    """Removes values that exclude those that are to be laid over them: of the keys of memory one applies."""
    given = {key for key in MEMORY & values.keys() if values[key] is not None}
    if section == "slurm" and given:
        for key in MEMORY - values.keys():
            target.pop(key, None)
