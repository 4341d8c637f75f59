"""Reads what the page shows from a run's folder; any part of it may be missing."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmscale.config import parse_yaml
from cmscale.config.methods import METHODS_BY_KIND
from cmscale.errors import UserError
from cmscale.io.json_text import parse_json
from cmscale.io.reading import read_regular
from cmscale.runs.folder import RunDir, step_of
from cmscale.runs.lineage import Lineage, read_lineage
from cmscale.runs.log import latest_metrics, read_lines
from cmscale.runs.results import EvaluationResult, read_evaluations

_ENDINGS = {
    "finished": "finished",
    "not_exported": "finished, not exported",
    "preempted": "preempted",
    "fault": "failed",
}


@dataclass(frozen=True)
class RunFacts:
    """The content of a run's folder. Missing files give empty parts.

    Attributes:
        config: The resolved config as nested dictionaries; `config_text` is the text of the file.
        metrics: metrics.jsonl, the last record of each step, by step.
        events: events.jsonl in the order written.
        evaluations: By step, weights and network evaluations; `unreadable` has one line per file that is not valid.
        grids: (step, file) of the sample grids, by step.
        lineage: The checkpoint of another run that the run began with; None if it is no branch.
        consistency: The results of `cmscale consistency-error`, by step; of one step by number of images, then by date.
    """

    run: RunDir
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluations: list[EvaluationResult]
    unreadable: list[str]
    grids: list[tuple[int, Path]]
    provenance: dict[str, Any]
    lineage: Lineage | None
    consistency: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.run.name

    def setting(self, key: str, default: Any = None) -> Any:
        """The config's value at a dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def method(self) -> str:
        """The method's title; its kind if this version does not have the method."""
        kind = str(self.setting("method.kind", ""))
        section = METHODS_BY_KIND.get(kind)
        return section.facts.title if section is not None else kind or "unknown method"

    @property
    def step(self) -> int:
        """The last step that metrics or events mention."""
        steps = [record["step"] for record in self.metrics[-1:]] + [event.get("step", 0) for event in self.events]
        return max(steps, default=0)

    @property
    def total_steps(self) -> int:
        return int(self.setting("train.total_steps", 0))

    @property
    def status(self) -> str:
        """How the run stands by the last event that determines it: a value of `_ENDINGS`, `running`, `not started`."""
        for event in reversed(self.events):
            if (name := event.get("event")) in _ENDINGS:
                return _ENDINGS[name]
            if name in ("start", "resumed", "requeued", "checkpoint", "recovered"):
                return "running"
        return "running" if self.metrics else "not started"


def read_facts(run: RunDir) -> RunFacts:
    """Reads a run's folder.

    Raises:
        UserError: The folder does not exist.
    """
    if not run.root.is_dir():
        raise UserError(f"{run.root}: no such run")
    text = run.config.read_text(errors="replace") if run.config.is_file() else ""
    config: Any = {}
    with contextlib.suppress(UserError):
        config = parse_yaml(text, origin=str(run.config))
    evaluations, unreadable = read_evaluations(run)
    provenance = _json(run.provenance) if run.provenance.exists() else {}
    consistency = [(path, _json(path)) for path in sorted(run.consistency_errors.glob("step-*.json"))]
    unreadable += [f"{path.name}: not the errors of a step" for path, found in consistency if not _is_of_step(found)]
    return RunFacts(
        run=run,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        metrics=latest_metrics(run),
        events=list(read_lines(run.events)),
        evaluations=evaluations,
        unreadable=unreadable,
        grids=[(step_of(path.stem), path) for path in sorted(run.samples.glob(f"step-{'[0-9]' * 9}.png"))],
        provenance=provenance if isinstance(provenance, dict) else {},
        lineage=read_lineage(run),
        consistency=sorted(
            (found for _, found in consistency if _is_of_step(found)),
            key=lambda each: (each["step"], each["num_samples"], str(each.get("date") or "")),
        ),
    )


def _is_of_step(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), int) for key in ("step", "num_samples"))


def _json(path: Path) -> Any:
    """The content of a JSON file; None if it is damaged."""
    try:
        return parse_json(read_regular(path))
    except ValueError:
        return None
