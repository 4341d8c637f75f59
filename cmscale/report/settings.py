"""Compares a run's config with the defaults of this version."""

from dataclasses import dataclass

from cmscale.config.keys import all_keys, written
from cmscale.report.facts import RunFacts

_MISSING = object()


@dataclass(frozen=True)
class Setting:
    """A key whose value is no default; `default` is empty where the key must be given."""

    key: str
    value: str
    default: str
    changes_losses: bool


def settings_of(facts: RunFacts) -> list[Setting]:
    """The keys of a run's config that differ from the defaults, in the order of the sections."""
    kind = facts.setting("method.kind")
    found = []
    for key in all_keys():
        if key.kinds and kind not in key.kinds:
            continue
        value = facts.written_setting(key.name, _MISSING)
        if value is _MISSING or (not key.is_required and written(value) == written(key.default)):
            continue
        default = "" if key.is_required else written(key.default)
        found.append(Setting(key.name, written(value), default, key.changes_losses))
    return found
