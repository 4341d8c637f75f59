"""Sums up a run in a few facts: whether it is alive and how that is known, how far and how fast it is, how good.

Every part of a run's folder may be missing, damaged or of another release; the other parts are shown all the same.
"""

import contextlib
import math
import os
import stat
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmscale.config import parse_yaml
from cmscale.errors import UserError
from cmscale.io.json_text import parse_json
from cmscale.io.reading import read_small
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.comparison import best_of, describe_basis
from cmscale.runs.folder import RunDir
from cmscale.runs.lineage import read_lineage
from cmscale.runs.log import read_lines, state_of, step_now
from cmscale.runs.results import read_evaluations
from cmscale.runs.standing import JobStates, quiet_seconds, state_and_reason

_TAIL = 1 << 16  # bytes of metrics.jsonl: some hundred records
_RECENT = 20  # records that the rate is taken from


@dataclass(frozen=True)
class Best:
    """The best score of a run, and what it was measured on, in words."""

    name: str
    value: float
    step: int | None
    nfe: int | None
    basis: str


@dataclass(frozen=True)
class Overview:
    """What is known of a run; None for what is not.

    Attributes:
        state: `running`, `queued`, `held`, `finished`, `stale`, `cancelled`, or what happened last: `preempted`,
            `fault`, ...
        known_by: How the state is known, in words.
        age_seconds: Since the first start.
        quiet_seconds: Since anything was written last.
        branch_of: The checkpoint that a branch began with, `RUN@STEP`.
        problems: What could not be read, one line each.
    """

    name: str
    path: str
    method: str | None
    state: str
    known_by: str
    age_seconds: float | None
    quiet_seconds: float | None
    step: int
    total_steps: int | None
    steps_per_second: float | None
    images_per_second: float | None
    eta_seconds: float | None
    loss: float | None
    best: Best | None
    branch_of: str | None
    problems: tuple[str, ...]


def runs_in(folder: Path) -> list[RunDir]:
    """The runs in a folder of runs, by name; folders that can't be looked into among them, which may be runs.

    Raises:
        UserError: the folder itself can't be looked into.
    """
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        return [RunDir(path) for path in found if _may_be_run(path)]
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror}); name another folder of runs") from None


def _may_be_run(folder: Path) -> bool:
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            return False
    except OSError as error:  # a link to what is gone, or to where this user may not look
        return isinstance(error, PermissionError)
    return os.path.lexists(folder / "config.yaml") or not os.access(folder, os.R_OK | os.X_OK)


def overview(run: RunDir, *, now: float | None = None, states_of: JobStates | None = None) -> Overview:
    """The facts of a run. Whatever its files hold, it raises nothing but what interrupts the program.

    Args:
        states_of: Answers of Slurm that are known; None asks it about each job.
    """
    problems: list[str] = []
    if not os.access(run.root, os.R_OK | os.X_OK):
        return _unseen(run)
    settings = _settings(run, problems)
    events = _records(run.events, problems)
    metrics = _records(run.metrics, problems, tail=True)
    now = time.time() if now is None else now
    quiet = quiet_seconds(run, now)
    state, known_by = state_and_reason(run, state_of(events), quiet, states_of)
    logged = _number(metrics[-1], "step") if metrics else None
    step, total = step_now(run, events, logged=int(logged or 0)), settings.get("total_steps")
    if not step:
        with contextlib.suppress(OSError, UserError):
            step = max(committed_steps(run), default=0)
    images_per_second = _rate(metrics)
    batch = settings.get("global_batch_size")
    rate = images_per_second / batch if images_per_second and batch else None
    started = next((moment for each in events if (moment := _number(each, "time"))), None)
    return Overview(
        name=run.name,
        path=str(run.root),
        method=settings.get("kind"),
        state=state,
        known_by=known_by,
        age_seconds=None if started is None else max(now - started, 0.0),
        quiet_seconds=quiet,
        step=step,
        total_steps=total,
        steps_per_second=rate,
        images_per_second=images_per_second,
        eta_seconds=max(total - step, 0) / rate if rate and total and state == "running" else None,
        loss=_number(metrics[-1], "loss") if metrics else None,
        best=_best(run, problems),
        branch_of=str(lineage) if (lineage := read_lineage(run)) else None,
        problems=tuple(problems),
    )


def _unseen(run: RunDir) -> Overview:
    """What is said of a folder that this user may not look into."""
    return Overview(
        name=run.name,
        path=str(run.root),
        method=None,
        state="unreadable",
        known_by="permissions of its folder",
        age_seconds=None,
        quiet_seconds=None,
        step=0,
        total_steps=None,
        steps_per_second=None,
        images_per_second=None,
        eta_seconds=None,
        loss=None,
        best=None,
        branch_of=None,
        problems=(f"{run.name}: its owner can allow you to read it with chmod",),
    )


def _settings(run: RunDir, problems: list[str]) -> dict[str, Any]:
    """`method.kind`, `train.total_steps` and `train.global_batch_size`, also of a config that this release refuses."""
    found: dict[str, Any] = {}
    try:
        text = read_small(run.config, what="a config").decode("utf-8", "replace")
        tree = parse_yaml(text, origin="config.yaml")
    except (OSError, UserError) as error:
        problems.append(" ".join(str(error).split()))
        return found
    for section, leaf, kind in (
        ("method", "kind", str),
        ("train", "total_steps", int),
        ("train", "global_batch_size", int),
    ):
        value = tree.get(section) if isinstance(tree, dict) else None
        value = value.get(leaf) if isinstance(value, dict) else None
        if isinstance(value, kind) and not isinstance(value, bool) and value:
            found[leaf] = value
        else:
            problems.append(f"config.yaml: {section}.{leaf} is missing or damaged")
    return found


def _records(path: Path, problems: list[str], *, tail: bool = False) -> list[dict[str, Any]]:
    """The records of a log; of a long one only the last, with `tail`."""
    try:
        if tail and path.is_file() and path.stat().st_size > _TAIL:
            return list(_last_records(path))
        return list(read_lines(path))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {getattr(error, 'strerror', None) or error}")
        return []


def _last_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        file.seek(-_TAIL, os.SEEK_END)
        for line in file.read().split(b"\n")[1:]:
            with contextlib.suppress(ValueError):
                if isinstance(record := parse_json(line), dict):
                    yield record


def _number(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _rate(metrics: list[dict[str, Any]]) -> float | None:
    """Images per second: the median of the last records, as single ones hold checkpoints and evaluations."""
    speeds = [speed for each in metrics[-_RECENT:] if (speed := _number(each, "images_per_second"))]
    return statistics.median(speeds) if speeds else None


def _best(run: RunDir, problems: list[str]) -> Best | None:
    try:
        evaluations, unreadable = read_evaluations(run)
    except OSError as error:
        problems.append(f"evaluations: {error}")
        return None
    problems += unreadable
    sampled = [each for each in evaluations if each.step is not None]
    if not sampled:
        return None
    best = best_of(sampled)
    return Best(best.score_name, best.fid.mean, best.step, best.nfe, describe_basis(best))
