"""Finds the copies of a run's checkpoints in `checkpoint.export_to`, and those that are missing there."""

from collections.abc import Collection

from cmscale.config.sections import Checkpoint
from cmscale.io.storage import Storage, open_storage
from cmscale.runs.checkpoints import committed_steps, kept_steps
from cmscale.runs.folder import RunDir


def exported_run(run: RunDir, export_to: str) -> Storage:
    """The storage of a run's copies: `export_to` and the run's name. Its layout is that of the run's folder."""
    return open_storage(export_to).sub(run.name)


def wanted_copies(steps: Collection[int], settings: Checkpoint) -> set[int]:
    """Of the steps that exist here or as copies, those of which a copy should exist."""
    if settings.export_keep_last is None:
        return set(steps)
    return kept_steps(steps, last=settings.export_keep_last, every=settings.export_keep_every)


def pending_exports(run: RunDir, export_to: str, settings: Checkpoint | None = None) -> list[int]:
    """The steps whose checkpoints are committed in the run's folder and not in `export_to`, oldest first.

    Copies that would only be removed again are not missing.
    """
    here, there = committed_steps(run), committed_steps(exported_run(run, export_to))
    wanted = wanted_copies({*here, *there}, settings or Checkpoint())
    return [step for step in here if step in wanted and step not in there]
