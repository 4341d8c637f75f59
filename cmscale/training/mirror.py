"""Follows a run's folder and sends what is new to another program, which can never stop or slow the training.

A mirror reads what training and evaluations have written, in a thread of its own, and keeps a mark of what it has sent.
So a resumed run goes on where its last start was: replayed steps are sent once, steps only ever rise, and what a start
could not send is sent by the next.
"""

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cmscale.errors import NoSpace, UserError
from cmscale.io.durable import replace_durably
from cmscale.io.json_text import parse_json
from cmscale.io.remarks import say
from cmscale.runs.folder import RunDir, step_of
from cmscale.runs.log import write_event
from cmscale.runs.results import EvaluationResult, read_evaluation_files

_LOOK_SECONDS = 15.0
"""Between two looks for evaluations, which other jobs write."""


class Sink(Protocol):
    """Where a mirror sends to. Every method may raise anything."""

    def record(self, step: int, numbers: dict[str, float]) -> None:
        """The metrics of a step, NaN and infinities among them; steps rise, unless the sink keeps no mark."""
        ...

    def grid(self, step: int, path: Path) -> None:
        """A grid of samples."""
        ...

    def evaluation(self, result: EvaluationResult) -> None:
        """A result of a network at a step, which may be an earlier one."""
        ...

    def flush(self) -> None:
        """Is called when all that is new was sent."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


@dataclass
class Mark:
    """What was sent.

    Attributes:
        step: The last step whose metrics were sent.
        row: A number that a sink may count its entries with.
        grid: The last step whose grid was sent.
        evaluations: Names of the results' files.
    """

    step: int = -1
    row: int = -1
    grid: int = -1
    evaluations: list[str] = field(default_factory=list)


class Follower:
    """Yields what is new in a run's folder.

    Args:
        name: Of the mirror: its mark is kept in the run's logs under this name; empty: it begins anew each time, and
            steps that are made again come again.
        unsure_seconds: For how long what was sent may be lost with the process.
    """

    def __init__(self, run: RunDir, name: str, *, unsure_seconds: float = 0.0) -> None:
        self._run = run
        self._file = run.mirror_mark(name) if name else None
        self._position = 0  # in metrics.jsonl
        self._kept = ""
        self.mark = self._read()
        self._unsure_seconds = unsure_seconds
        self._marks = deque([(-math.inf, asdict(self.mark))])  # by the time of their look: a safe one, then the unsure

    def records(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The metrics of steps above all that were sent; without a mark of all that were written."""
        with contextlib.suppress(FileNotFoundError), self._run.metrics.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    return
                self._position += len(line)
                with contextlib.suppress(ValueError):
                    step = record.get("step") if isinstance(record := parse_json(line), dict) else None
                    if type(step) is int and (step > self.mark.step or self._file is None):
                        yield step, numbers_of(record)
                        self.mark.step = step

    def grids(self) -> Iterator[tuple[int, Path]]:
        """(step, file) of the sample grids above the last that was sent."""
        for path in sorted(self._run.samples.glob(f"step-{'[0-9]' * 9}.png")):
            if (step := step_of(path.stem)) > self.mark.grid:
                yield step, path
                self.mark.grid = step

    def evaluations(self) -> Iterator[EvaluationResult]:
        """The results that were not sent yet."""
        for path, result in read_evaluation_files(self._run, without=set(self.mark.evaluations)):
            if result is None:  # it may be in the middle of being written; the next look reads it again
                continue
            if result.step is not None:
                yield result
            self.mark.evaluations.append(path.name)

    def keep(self, *, is_safe: bool = True) -> None:
        """Writes down what was sent.

        Args:
            is_safe: Whether all of it outlives the process; else the mark of some seconds ago is kept. Rows are never
                used again.
        """
        now = time.monotonic()
        if asdict(self.mark) != self._marks[-1][1]:
            self._marks.append((now, asdict(self.mark)))
        while len(self._marks) > 1 and (is_safe or self._marks[1][0] <= now - self._unsure_seconds):
            self._marks.popleft()
        text = json.dumps({**self._marks[0][1], "row": self.mark.row})
        if self._file is not None and text != self._kept:
            replace_durably(self._file, text.encode(), within=self._run.root)
            self._kept = text

    def _read(self) -> Mark:
        with contextlib.suppress(OSError, ValueError, TypeError):
            if self._file is not None:
                return Mark(**parse_json(self._file.read_bytes()))
        return Mark()


def mark_all_as_sent(run: RunDir, name: str) -> None:
    """Writes the mark of a mirror that was sent what the run's folder has."""
    follower = Follower(run, name)
    for _ in (*follower.records(), *follower.grids(), *follower.evaluations()):
        pass
    follower.mark.row = follower.mark.step
    with contextlib.suppress(OSError, UserError):
        follower.keep()


def _has_news(run: RunDir, name: str) -> bool:
    """Whether a run's folder has what a mirror was not sent."""
    follower = Follower(run, name)
    return any(True for news in (follower.records, follower.grids, follower.evaluations) for _ in news())


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, without its step."""
    return {name: value for name, value in record.items() if name != "step" and type(value) in (int, float)}


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """Those that a curve can show."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class Mirror:
    """Sends a run to a sink in a thread of its own; the first failure ends it, with an event and a line in the log.

    A disk that is full for a while ends nothing: what could not be written down is written at a later look.

    Args:
        only_news: Whether nothing is opened if all was sent before.
        unsure_seconds: For how long a kill may lose what the sink was sent: so much is sent again.

    Attributes:
        failure: Why it has ended early; empty if it has not.
        leaving: Whether the training was asked to stop: the signal has ended wandb's process too, which is no event.
    """

    def __init__(
        self,
        run: RunDir,
        name: str,
        open_sink: Callable[[Mark], Sink | None],
        *,
        keeps_mark: bool = True,
        only_news: bool = False,
        unsure_seconds: float = 0.0,
    ) -> None:
        self._unsure_seconds = unsure_seconds
        self._only_news = only_news and keeps_mark
        self.name = name
        self.failure = ""
        self.leaving: Callable[[], bool] = lambda: False
        self._run = run
        self._open = open_sink
        self._keeps_mark = keeps_mark
        self._news = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=f"{name}-mirror", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Tells the mirror that something was written."""
        self._news.set()

    def close(self, patience: float = 10.0) -> None:
        """Lets the mirror send what is left, without waiting longer than `patience` seconds."""
        self._closing = True
        self._news.set()
        self._thread.join(patience)

    def _work(self) -> None:
        try:
            name = self.name if self._keeps_mark else ""
            follower = Follower(self._run, name, unsure_seconds=self._unsure_seconds)
            if self._only_news and not _has_news(self._run, self.name):
                return
            with contextlib.suppress(NoSpace):  # a run without a mark counts as one that an earlier release sent
                follower.keep(is_safe=False)
            sink = self._open(follower.mark)
            while sink is not None:
                self._news.wait(_LOOK_SECONDS)
                is_last = self._closing  # before the look, so that nothing written by then is missed
                self._news.clear()
                if not self._run.root.is_dir():  # moved or removed: not even wandb's own files make it anew
                    if is_last:
                        return
                    continue
                self._send(follower, sink)
                if is_last:
                    sink.close()
                    follower.keep()
                    return
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.failure = " ".join(why.split())  # some packages' are several lines
            later = f"the run's next start or `cmscale mirror {self._run.root}` sends the rest"
            say(f"{self.name}: no more is sent ({self.failure}); {later}")
            with contextlib.suppress(OSError, UserError):
                if not self.leaving():
                    write_event(self._run, f"{self.name}_failed", step=-1, rank=0, why=self.failure)

    def _send(self, follower: Follower, sink: Sink) -> None:
        """Sends what is new; what was sent before a failure is not sent again."""
        try:
            for step, numbers in follower.records():
                sink.record(step, numbers)
            for step, path in follower.grids():
                sink.grid(step, path)
            for result in follower.evaluations():
                sink.evaluation(result)
            sink.flush()
        finally:
            with contextlib.suppress(NoSpace):
                follower.keep(is_safe=False)


def evaluation_names(result: EvaluationResult) -> dict[str, float]:
    """The means of an evaluation by a name that tells apart weights, sampling, features and number of samples."""
    how = f"{result.weights}/nfe{result.nfe}{'-searched' if result.times else ''}/n{result.num_samples}"
    reference = str(result.reference.get("sha256") or "")[:8]
    titles = {name: result.names.get(name, result.score_name if name == "fid" else name) for name in result.metrics}
    return {f"evaluation/{titles[name]}/{how}/ref{reference}": each.mean for name, each in result.metrics.items()}
