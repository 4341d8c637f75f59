"""Finds the copies of a run's checkpoints in `checkpoint.export_to`, and those that are missing there."""

from cmscale.io.storage import Storage, open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import RunDir


def exported_run(run: RunDir, export_to: str) -> Storage:
    """The storage of a run's copies: `export_to` and the run's name. Its layout is that of the run's folder."""
    return open_storage(export_to).sub(run.name)


def pending_exports(run: RunDir, export_to: str) -> list[int]:
    """The steps whose checkpoints are committed in the run's folder and not in `export_to`, oldest first."""
    remote = set(committed_steps(exported_run(run, export_to)))
    return [step for step in committed_steps(run) if step not in remote]
