"""Reads metrics.jsonl by column, in bounded memory: a long run has hundreds of thousands of lines."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmscale.io import traffic
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines

_LARGEST_STEP = 1 << 53


@dataclass(frozen=True)
class Series:
    """A quantity by step, ascending; every value is finite."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def points(self) -> list[tuple[int, float]]:
        """(step, value) by step."""
        return list(zip(self.steps.tolist(), self.values.tolist(), strict=True))

    def recent(self, count: int = 20) -> float | None:
        """The median of the last values; None if there are none."""
        return float(np.median(self.values[-count:])) if len(self) else None


@dataclass
class Measured:
    """The numbers of metrics.jsonl, without those of steps that a run went back behind and may have taken otherwise.

    Attributes:
        records: Number of lines that were read.
        columns: By name the values that were written; by line.
    """

    records: int = 0
    columns: dict[str, Series] = field(default_factory=dict)

    def of(self, name: str) -> Series:
        """The finite values of a quantity; none if it was not logged."""
        return self.columns.get(name, Series(np.empty(0, np.int64), np.empty(0)))

    @property
    def last_step(self) -> int | None:
        """The last step that has a value; None if none has."""
        steps = [int(each.steps[-1]) for each in self.columns.values() if len(each)]
        return max(steps, default=None)


def read_measured(run: RunDir) -> Measured:
    """Reads the metrics of a run; of a long file it shows how far it is."""
    size = run.metrics.stat().st_size if run.metrics.is_file() else 0
    with traffic.showing(f"reading {run.metrics}", size) as shown:
        return _measured(read_lines(run.metrics, count=shown.moved))


def _measured(records: Iterable[dict[str, Any]]) -> Measured:
    steps = array("q")
    lines: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    for record in records:
        step = record.get("step")
        if type(step) is not int or not 0 <= step < _LARGEST_STEP:
            continue
        for name, value in record.items():
            kind = type(value)
            if kind is float or (kind is int and -_LARGEST_STEP < value < _LARGEST_STEP):
                lines.setdefault(name, array("q")).append(len(steps))
                values.setdefault(name, array("d")).append(value)
        steps.append(step)
    of_line = np.array(steps, np.int64)
    counts = _are_of_the_way_taken(of_line)
    columns = {}
    for name, numbers in values.items():
        where, found = np.array(lines[name], np.int64), np.array(numbers)
        kept = counts[where] & np.isfinite(found)
        columns[name] = Series(of_line[where[kept]], found[kept])
    return Measured(records=len(steps), columns=columns)


def _are_of_the_way_taken(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each line led to the last one: no line behind it has its step or an earlier one. These steps ascend."""
    least_behind = np.minimum.accumulate(np.append(steps, _LARGEST_STEP)[::-1])[::-1][1:]
    return steps < least_behind


@dataclass(frozen=True)
class Band:
    """A series in few points: mean, least and largest value of each stretch of steps.

    Attributes:
        counts: Values of each stretch; all 1 if nothing was joined.
    """

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def is_joined(self) -> bool:
        """Whether a point stands for several values."""
        return bool((self.counts > 1).any())


def decimated(series: Series, most: int = 400) -> Band:
    """A series in at most `most` points, over stretches of equal length; as it is, if it has no more."""
    steps, values = series.steps.astype(np.float64), series.values
    if len(series) <= most:
        return Band(steps, values, values, values, np.ones(len(series), np.int64))
    span = steps[-1] - steps[0]
    stretch = np.minimum((steps - steps[0]) * (most / span), most - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(stretch, prepend=-1))
    counts = np.diff(starts, append=len(steps))
    return Band(
        steps=np.add.reduceat(steps, starts) / counts,
        mean=np.add.reduceat(values, starts) / counts,
        low=np.minimum.reduceat(values, starts),
        high=np.maximum.reduceat(values, starts),
        counts=counts,
    )
