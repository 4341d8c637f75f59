"""Keeps what a command has measured so far, and decides whether results that exist are returned or made anew."""

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cmscale.config.requests import MeasuringRequest
from cmscale.errors import UserError
from cmscale.io.fetch import cache_folder, is_unused
from cmscale.io.storage import open_parent
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import Document, read_document
from cmscale.runs.results import hash_of
from cmscale.source import Source

AWAY_SECONDS = 60.0
"""For so long a run's folder may be away, as when its storage is mounted anew."""
_LOOK_SECONDS = 1.0

D = TypeVar("D", bound=Document)


def work_folder(source: Source, run_dir: str | None) -> Path:
    """Where blocks are stored: in the source's run, else in `run_dir`, else in the cache."""
    home = source.run_dir or (None if run_dir is None else Path(run_dir))
    return cache_folder() / "evaluations" if home is None else RunDir(home).evaluation_progress


def _remove_unused(folder: Path) -> None:
    """Removes blocks that are not used, as of an evaluation that was given up."""
    with contextlib.suppress(OSError):  # others may remove it, too
        for begun in (path for path in folder.iterdir() if path.is_dir()):
            with contextlib.suppress(OSError):
                if is_unused(begun):
                    shutil.rmtree(begun, ignore_errors=True)


def is_gone(run_dir: Path | None) -> bool:
    """Whether a run that is measured was moved or removed meanwhile: what is written there would make it anew.

    A folder that is away is waited for, `AWAY_SECONDS` long.
    """
    until = time.monotonic() + AWAY_SECONDS
    while run_dir is not None and not RunDir(run_dir).checkpoints.is_dir():
        if (left := until - time.monotonic()) <= 0:
            return True
        time.sleep(min(left, _LOOK_SECONDS))
    return False


def must_be_there(run_dir: Path | None, *, gone: bool | None = None) -> None:
    """Raises UserError if a run that is measured `is_gone`: as this rank sees it now, or as the ranks have agreed."""
    if is_gone(run_dir) if gone is None else gone:
        raise UserError(
            f"{run_dir}: is gone: was it moved or removed, or is it not mounted? What was measured is in it; the same "
            "command goes on where it is now"
        )


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
        """Ends the request's own folder: its metrics replace the older ones. Removes what others gave up."""
        if self.home.is_dir():
            _remove_unused(self.home)
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
