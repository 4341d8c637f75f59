"""Finds the copies of a run's checkpoints and snapshots in `checkpoint.export_to`, and those that are missing there."""

from collections.abc import Collection
from typing import NamedTuple

from cmscale.config.sections import Checkpoint
from cmscale.io.storage import Storage, open_storage
from cmscale.runs.checkpoints import committed_steps, kept_steps
from cmscale.runs.folder import RunDir, step_name


class Copied(NamedTuple):
    """A folder of a run that is copied: a checkpoint, or a snapshot of the averages by a power function.

    In order, a snapshot comes before the checkpoint of its step: whoever finds the checkpoint finds the snapshot, too.
    """

    step: int
    is_checkpoint: bool = True

    @property
    def key(self) -> str:
        """Its place in the run's folder, and below the run's copies."""
        return f"{'checkpoints' if self.is_checkpoint else 'snapshots'}/{step_name(self.step)}"

    def __str__(self) -> str:
        return str(self.step) if self.is_checkpoint else f"{self.step} (its snapshot)"


def exported_run(run: RunDir, export_to: str) -> Storage:
    """The storage of a run's copies: `export_to` and the run's name. Its layout is that of the run's folder."""
    return open_storage(export_to).sub(run.name)


def committed(run: RunDir | Storage) -> set[Copied]:
    """The complete checkpoints and snapshots of a run, or of its copies."""
    checkpoints, snapshots = committed_steps(run), committed_steps(run, within="snapshots")
    return {*map(Copied, checkpoints), *(Copied(step, is_checkpoint=False) for step in snapshots)}


def wanted_copies(found: Collection[Copied], settings: Checkpoint) -> set[Copied]:
    """Of what exists here or as a copy, that of which a copy should exist.

    Every snapshot's should: an average of any length needs those of all steps before.
    """
    if settings.export_keep_last is None:
        return set(found)
    steps = [each.step for each in found if each.is_checkpoint]
    kept = kept_steps(steps, last=settings.export_keep_last, every=settings.export_keep_every)
    return {each for each in found if not each.is_checkpoint or each.step in kept}


def pending_copies(run: RunDir, export_to: str, settings: Checkpoint | None = None) -> list[Copied]:
    """What is committed in the run's folder and not in `export_to`, oldest first.

    Copies that would only be removed again are not missing.
    """
    here, there = committed(run), committed(exported_run(run, export_to))
    return sorted((here - there) & wanted_copies(here | there, settings or Checkpoint()))
