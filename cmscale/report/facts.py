"""Reads what the page shows from a run's folder; any part of it may be missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cmscale.config import parse_yaml
from cmscale.config.methods import METHODS_BY_KIND
from cmscale.errors import UserError
from cmscale.io.json_text import parse_json
from cmscale.io.reading import files_in, read_regular, utf8
from cmscale.report.measured import Measured, read_measured
from cmscale.runs.folder import RunDir, step_of
from cmscale.runs.lineage import Lineage, read_lineage
from cmscale.runs.log import read_lines, step_now
from cmscale.runs.meant import run_meant
from cmscale.runs.results import EvaluationResult, read_evaluations
from cmscale.runs.standing import how_it_stands

T = TypeVar("T")


@dataclass(frozen=True)
class RunFacts:
    """The content of a run's folder. Missing files give empty parts.

    Attributes:
        config: The resolved config as nested dictionaries; `config_text` is the text of the file.
        config_mistake: Why it can't be read; empty if it can.
        measured: metrics.jsonl by column.
        events: events.jsonl in the order written.
        evaluations: By step, weights and network evaluations; `unreadable` has one line per file that is not valid.
        grids: (step, file) of the sample grids, by step.
        placement: Where the newest job of the run was sent.
        lineage: The checkpoint of another run that the run began with; None if it is no branch.
        consistency: The results of `cmscale consistency-error`, by step; of one step by number of images, then by date.
        shown_name: What tells the run apart from others that are shown with it; empty: its own name.
    """

    run: RunDir
    config: dict[str, Any]
    config_text: str
    config_mistake: str
    measured: Measured
    events: list[dict[str, Any]]
    evaluations: list[EvaluationResult]
    unreadable: list[str]
    grids: list[tuple[int, Path]]
    provenance: dict[str, Any]
    placement: dict[str, Any]
    lineage: Lineage | None
    consistency: list[dict[str, Any]]
    shown_name: str = ""

    @property
    def name(self) -> str:
        """What the run is called on the page."""
        return utf8(self.shown_name or self.run.name)

    def setting(self, key: str, default: Any = None) -> Any:
        """The config's value at a dotted key; `default` where it is null, or there is no such key."""
        value = self.written_setting(key)
        return default if value is None else value

    def written_setting(self, key: str, missing: Any = None) -> Any:
        """The config's value at a dotted key, null too; `missing` if it has no such key."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return missing
            value = value[part]
        return value

    @property
    def method(self) -> str:
        """The method's title; its kind if this version does not have the method."""
        kind = str(self.setting("method.kind", ""))
        section = METHODS_BY_KIND.get(kind)
        return section.facts.title if section is not None else kind or "unknown method"

    @property
    def step(self) -> int:
        """The step where the run is now, also after it went back."""
        return step_now(self.run, self.events, logged=self.measured.last_step or 0)

    @property
    def total_steps(self) -> int:
        """The steps of the whole training; 0 if the config does not tell."""
        total = self.setting("train.total_steps")
        return total if type(total) is int else 0

    def state(self) -> tuple[str, str]:
        """How the run stands now, and how that is known; `failed` after a fault, else as `cmscale runs` says it."""
        state, known_by = how_it_stands(self.run, self.events)
        return ("failed" if state == "fault" else state), known_by


def read_several(runs: Sequence[RunDir]) -> list[RunFacts]:
    """The facts of runs that are shown together: their paths stand for names that two of them share.

    Raises:
        UserError: a folder does not exist.
    """
    names = [run.name for run in runs]
    return [
        replace(read_facts(run), shown_name=run.name if names.count(run.name) == 1 else str(run.root)) for run in runs
    ]


def _is_event(record: dict[str, Any]) -> bool:
    """Whether a line is an event as training writes them, and nothing that only looks like one."""
    return all(isinstance(record.get(name, ""), str) for name in ("event", "why"))


def read_facts(run: RunDir, *, with_metrics: bool = True) -> RunFacts:
    """Reads a run's folder.

    Args:
        with_metrics: Whether metrics.jsonl is read, which may be long.

    Raises:
        UserError: The folder does not exist.
    """
    if not run.root.is_dir():
        raise UserError(f"{run.root}: no such run{run_meant(run.root)}")
    evaluations, unreadable = read_evaluations(run)

    def part(name: str, read: Callable[[], T], missing: T) -> T:
        """What `read` gives; where a file may not be read `missing`, and a line that says so."""
        try:
            return read()
        except OSError as error:
            unreadable.append(f"{name}: {error.strerror}")
            return missing

    text = part("config.yaml", lambda: run.config.read_text(errors="replace") if run.config.is_file() else "", "")
    config: Any = {}
    config_mistake = ""
    try:
        config = parse_yaml(text, origin=run.config.name)
    except UserError as error:
        config_mistake = str(error)
    provenance, placement = (
        part(path.name, lambda path=path: _json(path) if path.exists() else {}, {})
        for path in (run.provenance, run.placement)
    )
    unreadable += [
        f"{path.name}: damaged"
        for path, found in ((run.provenance, provenance), (run.placement, placement))
        if not isinstance(found, dict)
    ]
    consistency = [
        (path, part(path.name, lambda path=path: _json(path), None))
        for path in files_in(run.consistency_errors, "step-*.json")
    ]
    unreadable += [f"{path.name}: not the errors of a step" for path, found in consistency if not _is_of_step(found)]
    return RunFacts(
        run=run,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        config_mistake=config_mistake,
        measured=part("metrics.jsonl", lambda: read_measured(run), Measured()) if with_metrics else Measured(),
        events=part("events.jsonl", lambda: [each for each in read_lines(run.events) if _is_event(each)], []),
        evaluations=evaluations,
        unreadable=unreadable,
        grids=[(step_of(path.stem), path) for path in files_in(run.samples, f"step-{'[0-9]' * 9}.png", unreadable)],
        provenance=provenance if isinstance(provenance, dict) else {},
        placement=placement if isinstance(placement, dict) else {},
        lineage=read_lineage(run),
        consistency=sorted(
            (found for _, found in consistency if _is_of_step(found)),
            key=lambda each: (each["step"], each["num_samples"], str(each.get("date") or "")),
        ),
    )


def _is_of_step(found: Any) -> bool:
    """Whether a document has what is drawn of a consistency error."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), int) for key in ("step", "num_samples")):
        return False
    times, neighbours, to_start = (found.get(key) for key in ("times", "neighbours", "to_start"))
    if not (isinstance(times, list) and isinstance(neighbours, list) and isinstance(to_start, list)):
        return False
    are_numbers = all(type(each) in (int, float) for each in (*times, *neighbours, *to_start))
    return are_numbers and len(times) == len(to_start) == len(neighbours) + 1 > 1 and "weights" in found


def _json(path: Path) -> Any:
    """The content of a JSON file; None if it is damaged."""
    try:
        return parse_json(read_regular(path))
    except ValueError:
        return None
