"""Owns what the page knows of a run: everything is read from its folder, whatever of it is there yet."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmscale.errors import UserError
from cmscale.runs.folder import RunDir, step_of
from cmscale.runs.log import latest_metrics, read_lines
from cmscale.runs.manifests import read_document
from cmscale.runs.results import EvaluationResult

METHODS = {
    "edm": "EDM diffusion model",
    "cd": "Consistency distillation",
    "ct": "Consistency training",
    "ict": "Improved consistency training",
    "ect": "Easy consistency tuning",
    "sct": "Continuous-time consistency training",
    "scd": "Continuous-time consistency distillation",
    "pd": "Progressive distillation",
}
_ENDINGS = {"finished": "finished", "preempted": "preempted", "fault": "failed"}


@dataclass(frozen=True)
class RunFacts:
    """A run's folder, read. Missing files give empty parts.

    Attributes:
        config: the resolved config as nested dictionaries, and `config_text` as it stands in the file.
        metrics: metrics.jsonl, the last record of each step, by step.
        events: events.jsonl in the order written.
        evaluations: by step, weights and number of evaluations; `unreadable` names files that are none.
        grids: (step, file) of the sample grids, by step.
        consistency: what `cmscale consistency-error` wrote, by step.
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
    consistency: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.run.name

    def setting(self, key: str, default: Any = None) -> Any:
        """A leaf of the config by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def method(self) -> str:
        kind = str(self.setting("method.kind", ""))
        return METHODS.get(kind, kind or "unknown method")

    @property
    def step(self) -> int:
        """The furthest step that the run has told of."""
        said = [record["step"] for record in self.metrics[-1:]] + [event.get("step", 0) for event in self.events]
        return max(said, default=0)

    @property
    def total_steps(self) -> int:
        return int(self.setting("train.total_steps", 0))

    @property
    def status(self) -> str:
        """`finished`, `preempted`, `failed`, `running` or `not started`: what the last telling event says."""
        for event in reversed(self.events):
            if (name := event.get("event")) in _ENDINGS:
                return _ENDINGS[name]
            if name in ("start", "resumed", "requeued", "checkpoint"):
                return "running"
        return "running" if self.metrics else "not started"


def read_facts(run: RunDir) -> RunFacts:
    """Reads a run's folder.

    Raises:
        UserError: no such folder.
    """
    if not run.root.is_dir():
        raise UserError(f"{run.root}: no such run")
    text = run.config.read_text() if run.config.exists() else ""
    config: Any = {}
    with contextlib.suppress(yaml.YAMLError):
        config = yaml.safe_load(text)
    evaluations, unreadable = _read_evaluations(run)
    provenance: Any = {}
    if run.provenance.exists():
        with contextlib.suppress(json.JSONDecodeError):
            provenance = json.loads(run.provenance.read_text())
    return RunFacts(
        run=run,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        metrics=latest_metrics(run),
        events=list(read_lines(run.events)),
        evaluations=evaluations,
        unreadable=unreadable,
        grids=[(step_of(path.stem), path) for path in sorted(run.samples.glob("step-?????????.png"))],
        provenance=provenance if isinstance(provenance, dict) else {},
        consistency=[json.loads(path.read_bytes()) for path in sorted(run.consistency_errors.glob("step-*.json"))],
    )


def _read_evaluations(run: RunDir) -> tuple[list[EvaluationResult], list[str]]:
    found, unreadable = [], []
    for path in sorted(run.evaluations.glob("*.json")):
        try:
            found.append(read_document(EvaluationResult, path.read_bytes(), origin=path.name))
        except UserError as error:
            unreadable.append(str(error))
    return sorted(found, key=lambda each: (each.step or 0, each.weights or "", each.nfe or 0)), unreadable
