"""Mirrors a run to Weights & Biases: metrics, grids of samples, evaluations; wandb adds the machine's own."""

import secrets
from functools import partial
from pathlib import Path
from typing import Any

from cmscale.config import Wandb
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.io.wandb_login import find_login
from cmscale.runs.folder import RunDir
from cmscale.runs.lineage import read_lineage
from cmscale.runs.results import EvaluationResult
from cmscale.training.mirror import Mark, Mirror, evaluation_names, finite, mark_all_as_sent

_UNSURE_SECONDS = 60.0
"""wandb's process writes what it was sent to its folder every 15 seconds, and to the server about as often."""


class WandbMirror(Mirror):
    """Sends a run to wandb.

    The wandb id is stored in the run's folder, so that a resumed run continues its wandb run. Entries are numbered on
    over all starts, as wandb drops entries with a number below its last one, also when it syncs the folders of several
    starts that were offline; `step` is a metric of its own, which is the axis of all others. After a kill the last
    minute is sent again, under new numbers, as wandb may have lost it.
    """

    def __init__(self, run: RunDir, settings: Wandb, *, config: dict[str, Any], only_news: bool = False) -> None:
        if run.wandb_id.exists() and not run.mirror_mark("wandb").exists():
            mark_all_as_sent(run, "wandb")  # by an earlier release, or from another folder
        opening = partial(_open, run, settings, config, patient=not only_news)
        super().__init__(run, "wandb", opening, only_news=only_news, unsure_seconds=_UNSURE_SECONDS)


class WandbSink:
    """An open run of wandb."""

    def __init__(self, opened: Any, mark: Mark) -> None:
        self._opened = opened
        self._mark = mark

    def record(self, step: int, numbers: dict[str, float]) -> None:
        self._log(step, finite(numbers))

    def grid(self, step: int, path: Path) -> None:
        import wandb

        self._log(step, {"sample_grid": wandb.Image(str(path), caption=f"step {step}")})

    def evaluation(self, result: EvaluationResult) -> None:
        self._log(result.step or 0, evaluation_names(result))

    def flush(self) -> None:
        """wandb sends by itself."""

    def close(self) -> None:
        self._opened.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        row = max(step, self._mark.row + 1)
        self._opened.log({"step": step, **values}, step=row, commit=True)  # else it is kept back until the next entry
        self._mark.row = row


def _open(run: RunDir, settings: Wandb, config: dict[str, Any], mark: Mark, *, patient: bool) -> WandbSink | None:
    """Begins or resumes the run's wandb run; None if the user has disabled wandb.

    Args:
        patient: Whether a server that does not answer gets a minute; somebody waits for a command.
    """
    import wandb

    mode = _mode(settings)
    if mode == "disabled":
        return None
    if not patient and mode in ("online", "shared"):
        login = find_login()
        if why := login.why_silent():
            raise UserError(f"{login.host} does not answer ({why})")
    opened = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=run.name,
        id=_identity(run),
        resume=None if mode == "offline" else "allow",  # folders of an offline run are joined when they are synced
        mode=mode,  # pyright: ignore[reportArgumentType]
        dir=str(run.root),
        config={**config, "branch_of": str(origin)} if (origin := read_lineage(run)) else config,
        settings=wandb.Settings(init_timeout=60, silent=True, console="off"),
    )
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")
    return WandbSink(opened, mark)


def disabled_by(settings: Wandb) -> str:
    """Where the user has disabled wandb for all programs, so that nothing is sent; empty if nowhere."""
    if settings.mode != "auto":
        return ""
    login = find_login()
    return login.mode_from if login.mode == "disabled" else ""


def unsynced(run: RunDir) -> list[Path]:
    """The folders of a run that wandb wrote offline and `wandb sync` has not sent yet."""
    folders = sorted((run.root / "wandb").glob("offline-run-*"))
    return [folder for folder in folders if not any(folder.glob("*.synced"))]


def _mode(settings: Wandb) -> str:
    """The config's mode; with `auto` that of WANDB_MODE or `wandb offline`, else online if there is a login."""
    if settings.mode != "auto":
        return settings.mode
    login = find_login()
    if login.mode is not None:
        return login.mode
    return "online" if login.has_key else "offline"


def _identity(run: RunDir) -> str:
    known = run.wandb_id.read_text().strip() if run.wandb_id.exists() else ""
    if not known:  # none yet, or a file that a crash left empty
        known = secrets.token_hex(8)
        replace_durably(run.wandb_id, known.encode())
    return known
