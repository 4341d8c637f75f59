"""Tells what happened to a run: events in few rows of which none is left out, and a line of time."""

import datetime
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmscale.runs.log import is_beside_training

_MOST_ROWS = 150
_MOST_REASONS = 3  # of a row
_PLACES = 400  # on the line of time
_STARTS = ("start", "resumed")
_ENDS = ("preempted", "requeued", "fault", "finished", "not_exported")
_NOTABLE = (*_STARTS, *_ENDS, "superseded", "rolled_back", "continued", "recovered")
"""Events between which others are counted by kind."""
_OF_BEGINNING = ("continued", "unfinished_save", "damaged_checkpoint", "caution")
"""What a start says before it is one: after the end of the start before it."""
_COMMON = ("time", "event", "step", "rank", "why", "measured_until")


@dataclass
class EventRow:
    """One or several events of a kind.

    Attributes:
        reasons: The first few different ones, with what else the event says; `more_reasons` counts the others.
    """

    event: str
    count: int = 0
    times: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    ranks: set[Any] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    more_reasons: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Adds an event to those of the row."""
        self.count += 1
        if (moment := as_number(record.get("time"))) is not None:
            self.times = [min([*self.times, moment]), max([*self.times, moment])]
        if type(step := record.get("step")) is int and step >= 0:
            self.steps = [min([*self.steps, step]), max([*self.steps, step])]
        if type(rank := record.get("rank")) is int:
            self.ranks.add(rank)
        why = str(record.get("why") or "")
        more = ", ".join(f"{key} {value}" for key, value in record.items() if key not in _COMMON)
        if why in self.reasons or (self.count > 1 and not why):
            return
        if len(self.reasons) < _MOST_REASONS:
            self.reasons[why] = more
        else:
            self.more_reasons += 1

    @property
    def at(self) -> str:
        """When they were, in words."""
        return _span([time_text(each) for each in self.times])

    @property
    def step(self) -> str:
        """At which steps they were, in words."""
        return _span([f"{each:,}" for each in self.steps])

    @property
    def told(self) -> list[tuple[str, str]]:
        """The reasons that say something, each with what else the event says, if it is a single one."""
        found = [(why, more if self.count == 1 else "") for why, more in self.reasons.items()]
        return [each for each in found if any(each)]

    @property
    def rank(self) -> str:
        """Which rank they are of, in words."""
        return str(*self.ranks) if len(self.ranks) == 1 else f"{len(self.ranks)} ranks" if self.ranks else ""


def _span(texts: Sequence[str]) -> str:
    return " – ".join(dict.fromkeys(texts))


def grouped(events: Sequence[dict[str, Any]]) -> list[EventRow]:
    """The events in at most about `_MOST_ROWS` rows, by time of their first.

    What happens often (checkpoints, copies, evaluations) becomes a row per kind between two starts or ends of the run.
    If these rows are too many still, events of one kind and with one reason become a row, then those of one kind.
    """
    rows: list[EventRow] = []
    for key in (_by_stretch(events), _by_reason, _by_kind):
        found: dict[Hashable, EventRow] = {}
        for place, record in enumerate(events):
            event = str(record.get("event", ""))
            found.setdefault(key(place, record), EventRow(event)).add(record)
        rows = list(found.values())
        if len(rows) <= _MOST_ROWS:
            return rows
    return rows[:_MOST_ROWS]  # so many kinds are in no log of this program


def _by_stretch(events: Sequence[dict[str, Any]]) -> Callable[[int, dict[str, Any]], Hashable]:
    stretches, stretch = [], 0
    for record in events:
        stretch += record.get("event") in _NOTABLE
        stretches.append(stretch)

    def key(place: int, record: dict[str, Any]) -> Hashable:
        event = str(record.get("event", ""))
        return place if event in _NOTABLE else (stretches[place], event)

    return key


def _by_reason(_: int, record: dict[str, Any]) -> Hashable:
    return str(record.get("event", "")), re.sub(r"\d+", "0", str(record.get("why") or ""))[:200]


def _by_kind(_: int, record: dict[str, Any]) -> Hashable:
    return str(record.get("event", ""))


@dataclass(frozen=True)
class Stretch:
    """The time between a start of the run and its end, in seconds; `ranks` None if the event does not say it."""

    began: float
    ended: float
    ranks: int | None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return max(self.ended - self.began, 0.0)


def stretches(events: Sequence[dict[str, Any]], *, last_sign: float | None = None) -> list[Stretch]:
    """When the run was at work. Of a start that did not say how it ended, until its last event or metrics.

    Args:
        last_sign: When the run wrote anything last.
    """
    found: list[Stretch] = []
    began: dict[str, Any] | None = None
    seen = 0.0
    for record in events:
        event = str(record.get("event", ""))
        moment = as_number(record.get("time"))
        if moment is None or is_beside_training(event):
            continue
        if event in _STARTS:
            if began is not None:
                found.append(_stretch(began, max(seen, as_number(record.get("measured_until")) or 0.0)))
            began = record
        elif began is not None and event in _ENDS:
            found.append(_stretch(began, moment))
            began = None
        if event not in _OF_BEGINNING:
            seen = moment
    if began is not None:
        found.append(_stretch(began, max(seen, last_sign or 0.0)))
    return found


def _stretch(began: dict[str, Any], ended: float) -> Stretch:
    ranks = began.get("ranks")
    return Stretch(began["time"], ended, ranks if type(ranks) is int and ranks > 0 else None)


@dataclass(frozen=True)
class Timeline:
    """What is drawn on the line of time; places and widths are in percent.

    Attributes:
        work: (place, width) of each stretch of work.
        marks: (place, kind, label) of the events; those of a kind that fall on one place are one.
        kinds: How many events of each kind there are.
    """

    work: list[tuple[float, float]]
    marks: list[tuple[float, str, str]]
    kinds: dict[str, int]
    first: str
    last: str


def timeline(events: Sequence[dict[str, Any]], *, last_sign: float | None = None) -> Timeline | None:
    """The run's line of time; None if less than two moments are known."""
    timed = [each for each in events if as_number(each.get("time")) is not None and str(each.get("event", ""))]
    moments = [each["time"] for each in timed]
    if len(timed) < 2 or max(moments) <= min(moments):
        return None
    first, span = min(moments), max(moments) - min(moments)
    rows: dict[tuple[int, str], EventRow] = {}
    kinds: dict[str, int] = {}
    for record in timed:
        kind = str(record["event"])
        kinds[kind] = kinds.get(kind, 0) + 1
        place = round(_PLACES * (record["time"] - first) / span)
        rows.setdefault((place, kind), EventRow(kind)).add(record)
    marks = [
        (100 * place / _PLACES, kind, f"{_counted(row)} at step {row.step or '?'}, {row.at}")
        for (place, kind), row in sorted(rows.items(), key=lambda each: each[0][1] in _NOTABLE)  # these on top
    ]
    work = _joined(
        [
            (100 * (each.began - first) / span, 100 * (min(each.ended, first + span) - first) / span)
            for each in stretches(events, last_sign=last_sign)
        ]
    )
    return Timeline(work, marks, kinds, time_text(first), time_text(first + span))


def _counted(row: EventRow) -> str:
    return row.event if row.count == 1 else f"{row.count} × {row.event}"


def _joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(place, width) of spans; those that lie closer than the eye can tell are one."""
    found: list[list[float]] = []
    for began, ended in spans:
        if found and began - found[-1][1] < 100 / _PLACES:
            found[-1][1] = max(found[-1][1], ended)
        else:
            found.append([began, ended])
    return [(began, max(ended - began, 0.2)) for began, ended in found]


def as_number(value: Any) -> float | None:
    """A value of a log, if it is a finite number of sensible size."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e15 else None


def time_text(value: Any) -> str:
    """Seconds since 1970 as text, UTC; what is no such number as it stands."""
    try:
        return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return str(value or "")
