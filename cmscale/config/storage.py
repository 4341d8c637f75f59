"""Defines the section `storage` of a config, and tells the storages of this process what it says."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cmscale.config.section import Section, operational
from cmscale.io.settings import INTERACTIVE_MINUTES, StorageSettings, use_settings


class StorageKeys(Section):
    """How storages such as S3 are used: patience, and what stores other than Amazon's need."""

    patience_minutes: Annotated[float, Field(ge=0)] = operational(
        30.0,
        "How long training, evaluations' jobs and data preparation wait for storage that does not answer. Commands "
        "that somebody watches wait a minute at most.",
        unit="minutes",
    )
    ca_bundle: str | None = operational(
        None, "File of certificates (PEM) to trust, of a server with a private authority. null: the system's."
    )
    requester_pays: bool = operational(False, "Whether this account pays for requests to somebody else's bucket.")
    conditional_writes: bool = operational(
        True,
        "false for stores that can't write only where nothing is (If-None-Match): then two starts of one run or "
        "preparation at the same moment are no longer told apart.",
    )

    def apply(self, *, interactive: bool = False) -> None:
        """Sets this process's use of storages.

        Args:
            interactive: Somebody watches: wait for a minute at most.
        """
        minutes = min(self.patience_minutes, INTERACTIVE_MINUTES) if interactive else self.patience_minutes
        use_settings(
            StorageSettings(
                patience_minutes=minutes,
                ca_bundle=str(Path(self.ca_bundle).expanduser()) if self.ca_bundle else None,
                requester_pays=self.requester_pays,
                conditional_writes=self.conditional_writes,
            )
        )
