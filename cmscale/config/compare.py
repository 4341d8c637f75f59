"""Compares configs key by key, grouped by whether a difference changes the losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmscale.config.added import SCHEDULE_LENGTHS
from cmscale.config.models import Config, leaves, trajectory

ABSENT = "not a key there"


@dataclass(frozen=True)
class Difference:
    """A key with different values.

    Attributes:
        values: One for each config, as JSON has them; `ABSENT` where the method has no such key.
        changes_losses: Whether a run can't be resumed with the other value.
    """

    key: str
    values: tuple[Any, ...]
    changes_losses: bool


def compared(configs: Sequence[Config]) -> list[Difference]:
    """The keys in which configs differ, those that change the losses first, else in the order of the sections."""
    values = [{key: _plain(value) for key, value, _ in leaves(config)} for config in configs]
    trajectories = [trajectory(config) for config in configs]
    moving = set().union(*trajectories)
    if any(each.get(name) != trajectories[0].get(name) for each in trajectories for name in SCHEDULE_LENGTHS):
        moving.add("train.total_steps")  # the length of a schedule that has none of its own
    keys = dict.fromkeys(key for each in values for key in each)
    rows = {key: tuple(each.get(key, ABSENT) for each in values) for key in keys}
    found = [
        Difference(key, shown, key in moving)
        for key, shown in rows.items()
        if any(value != shown[0] for value in shown)
    ]
    return sorted(found, key=lambda each: not each.changes_losses)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
