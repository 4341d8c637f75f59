"""Keeps what a command has measured so far, and decides whether results that exist are returned or made anew."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cmscale.config.requests import MeasuringRequest
from cmscale.errors import UserError
from cmscale.io.storage import open_parent
from cmscale.runs.manifests import Document, read_document
from cmscale.runs.results import hash_of

D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class Progress:
    """The folder in which a command stores blocks and the metrics of finished seeds.

    With `--force` it is a folder of the request's own, inside `home`: nothing that was measured before is used. If the
    command is interrupted, an equal request continues in that folder, so that a job that is preempted again and again
    ends. When all that was asked for is measured, what the folder holds replaces what was measured before.
    """

    home: Path
    folder: Path

    @classmethod
    def of(cls, request: MeasuringRequest, home: Path) -> "Progress":
        """The progress of a request; `home` is the folder that all commands on a source share."""
        if not request.force:
            return cls(home, home)
        return cls(home, home / f"anew-{hash_of(request.model_dump(mode='json'))[:16]}")

    @property
    def is_anew(self) -> bool:
        """Whether the work begins anew (`--force`), apart from what was done before."""
        return self.folder != self.home

    def counts(self, key: str) -> bool:
        """Whether a result with this key that exists is what the request asks for; never one from before `--force`."""
        return not self.is_anew or self._mark(key).exists()

    def finish(self, key: str) -> None:
        """Notes that the result with this key is written."""
        if self.is_anew:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mark(key).touch()

    def close(self) -> None:
        """Ends the request's own folder: its metrics replace the older ones."""
        if not self.is_anew or not self.folder.exists():
            return
        for path in self.folder.glob("*.json"):
            path.replace(self.home / path.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _mark(self, key: str) -> Path:
        return self.folder / f"{key}.done"


def existing(kind: type[D], out: str | Path) -> D | None:
    """The document at a path or URL; None if nothing is there.

    Raises:
        UserError: something else is there, which is not written over.
    """
    storage, name = open_parent(out)
    raw = storage.read_if_present(name)
    if raw is None:
        return None
    try:
        return read_document(kind, raw, origin=str(out))
    except UserError as error:
        raise UserError(f"{error}; it is not written over: give another --out, or remove it") from None
