"""Writes a run's newest numbers as a text file that the textfile collector of Prometheus's node exporter reads."""

import contextlib
import hashlib
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from cmscale.config import Prometheus
from cmscale.errors import NoSpace
from cmscale.io.durable import replace_durably
from cmscale.runs.folder import RunDir
from cmscale.runs.lineage import read_lineage
from cmscale.runs.log import read_lines
from cmscale.runs.results import EvaluationResult
from cmscale.training.mirror import Mark, Mirror

_HELP = {
    "step": "Last step that was logged.",
    "total_steps": "Steps of the whole training.",
    "running": "1 while the training's process lives, 0 after its orderly end.",
    "written_timestamp_seconds": "When this file was written.",
    "events": "Lines of events.jsonl by kind.",
    "branch_info": "1 in a branch; its label says which checkpoint it began with.",
    "evaluation": "Mean of a metric at the newest step that was evaluated.",
}


class PrometheusFile(Mirror):
    """Keeps the file of a run up to date; it is replaced as a whole."""

    def __init__(self, run: RunDir, settings: Prometheus, *, total_steps: int) -> None:
        super().__init__(run, "prometheus", partial(_open, run, settings, total_steps), keeps_mark=False)


class PrometheusSink:
    """The newest numbers of a run."""

    def __init__(self, run: RunDir, path: Path, total_steps: int) -> None:
        self._run = run
        self._path = path
        self._numbers: dict[str, float] = {"total_steps": total_steps}
        self._evaluations: dict[tuple[str, ...], tuple[int, float]] = {}
        self._labels = {"run": run.name, "folder": str(run.root.absolute())}

    def record(self, step: int, numbers: dict[str, float]) -> None:
        self._numbers |= {"step": step, **numbers}

    def grid(self, step: int, path: Path) -> None:
        """Pictures are no numbers."""

    def evaluation(self, result: EvaluationResult) -> None:
        step = result.step or 0
        for name, metric in result.metrics.items():
            title = result.names.get(name, result.score_name if name == "fid" else name)
            nfe = f"{result.nfe}{'-searched' if result.times else ''}"
            reference = str(result.reference.get("sha256") or "")[:8]
            key = (title, result.weights or "", nfe, str(result.num_samples), reference)
            if step >= self._evaluations.get(key, (0, 0.0))[0]:
                self._evaluations[key] = (step, metric.mean)

    def flush(self) -> None:
        with contextlib.suppress(NoSpace):  # the next look writes it; how old the file is, is in it
            self._write(running=1)

    def close(self) -> None:
        self._write(running=0)

    def _write(self, *, running: int) -> None:
        numbers = {**self._numbers, "running": running, "written_timestamp_seconds": round(time.time(), 3)}
        lines = [line for name, value in numbers.items() for line in _family(name, [({}, value)], self._labels)]
        if origin := read_lineage(self._run):
            lines += _family("branch_info", [({"branch_of": str(origin)}, 1)], self._labels)
        events = Counter(str(each.get("event")) for each in read_lines(self._run.events))
        lines += _family("events", [({"event": name}, count) for name, count in events.items()], self._labels)
        names = ("metric", "weights", "nfe", "samples", "reference")
        results = [
            ({**dict(zip(names, key, strict=True)), "step": str(step)}, value)
            for key, (step, value) in self._evaluations.items()
        ]
        lines += _family("evaluation", results, self._labels)
        replace_durably(self._path, "".join(lines).encode(), within=self._run.root)


def _open(run: RunDir, settings: Prometheus, total_steps: int, _: Mark) -> PrometheusSink:
    return PrometheusSink(run, prometheus_file(run, settings), total_steps)


def prometheus_file(run: RunDir, settings: Prometheus) -> Path:
    """The file of a run: in its own folder, or in the collector's under a name that no other run has."""
    if settings.folder is None:
        return run.prometheus
    place = hashlib.sha256(str(run.root.absolute()).encode()).hexdigest()[:8]
    return Path(settings.folder).expanduser() / f"cmscale-{re.sub(r'[^A-Za-z0-9._-]', '_', run.name)[:80]}-{place}.prom"


def _family(name: str, values: list[tuple[dict[str, str], float]], labels: dict[str, str]) -> list[str]:
    """The lines of a metric; none without values."""
    if not values:
        return []
    metric = f"cmscale_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"
    lines = [
        f"# HELP {metric} {_HELP.get(name, f'{name} in metrics.jsonl, last logged.')}\n",
        f"# TYPE {metric} gauge\n",
    ]
    for own, value in values:
        written = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**labels, **own}.items())
        lines.append(f"{metric}{{{written}}} {value!r}\n")
    return lines


def _escaped(text: Any) -> str:
    """A label's value; of a folder's name that is no UTF-8 the odd bytes are written out."""
    known = str(text).encode("utf-8", "backslashreplace").decode()
    return known.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
