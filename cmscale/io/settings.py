"""Holds how this process uses storages: how long it waits for them, and what their servers need to be told."""

from dataclasses import dataclass

INTERACTIVE_MINUTES = 1.0
"""For how long a command that somebody watches waits for storage that does not answer."""


@dataclass(frozen=True)
class StorageSettings:
    """What the section `storage` of a config says; see `cmscale.config.storage`."""

    patience_minutes: float = INTERACTIVE_MINUTES
    ca_bundle: str | None = None
    requester_pays: bool = False
    conditional_writes: bool = True


_current = StorageSettings()


def storage_settings() -> StorageSettings:
    """The settings of this process; forked processes have their parent's."""
    return _current


def use_settings(settings: StorageSettings) -> None:
    """Sets them for this process, for storages that are opened afterwards."""
    global _current
    _current = settings
