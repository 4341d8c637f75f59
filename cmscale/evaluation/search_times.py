"""Searches the sampling times of a source: each trial is measured on all ranks and stored, and never repeated.

Searches that may have other results have other files. The same search again returns what it found.
"""

import contextlib
import math
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from cmscale.config import Config
from cmscale.config.requests import SearchTimesRequest
from cmscale.consistency.grid import indexed_sigmas
from cmscale.consistency.solver import Denoise
from cmscale.distributed import collectives
from cmscale.distributed import world as worlds
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation.progress import Progress, existing, must_be_there, work_folder
from cmscale.evaluation.session import (
    TIMEOUT_MINUTES,
    EvaluationSession,
    describe_step,
)
from cmscale.evaluation.ternary_search import Indices, most_trials, search
from cmscale.generation.draw import SampleRequest
from cmscale.io.counting import Counting
from cmscale.io.durable import replace_durably
from cmscale.io.place import Place
from cmscale.runs.folder import RunDir
from cmscale.runs.results import TimeSearch, Trial, hash_of, utc_now
from cmscale.source import Source, checkpoint_step, load_source, model_kind


class Interrupted(Exception):
    """Raised if a preemption interrupts a trial."""


def run(request: SearchTimesRequest) -> Path | None:
    """Searches in this process, which may be one of torchrun's ranks.

    Returns:
        The result's file; None if a signal interrupted.
    """
    preemption = Preemption.install()
    world = worlds.detect(request.device)
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        return _search(request, world, preemption=preemption)


def _search(request: SearchTimesRequest, world: worlds.World, *, preemption: Preemption) -> Path | None:
    request.refuse_unused(source=model_kind(request.source))
    source = load_source(
        request.source,
        weights=request.weights,
        step=checkpoint_step(request.step),
        config=request.config,
        overrides=request.overrides,
    )
    last = source.config.method.second_time.last
    if not source.config.method.facts.is_consistency_model:
        raise UserError(f"{request.source}: a diffusion model has no multistep times; give a consistency model")
    if request.steps > last:
        raise UserError(f"--steps {request.steps}: the grid of times has {last} steps; give at most {last}")
    evaluating, data = source.config.evaluate, source.config.data.path
    with worlds.same_arithmetic(world.device), contextlib.suppress(Interrupted):
        session = EvaluationSession.build(request, evaluating, world, data=data, preemption=preemption)
        session.refuse_other_size(source)
        return Trials(request, source, session).find()
    return None


class Trials:
    """One search. Its document is written after every trial; with `--force` at first in the request's own folder."""

    def __init__(self, request: SearchTimesRequest, source: Source, session: EvaluationSession) -> None:
        self._source = source
        self._session = session
        self._start, self._last = _start(source.config), source.config.method.second_time.last
        self._progress = Progress.of(request, work_folder(source, None))
        reference = collectives.from_main(None if session.reference is None else session.reference.describe())
        num = session.settings.num_samples
        sampling = session.identity(source, SampleRequest(num=num))
        del sampling["sigmas"]  # each trial has its own
        network = {"step": source.step, "weights": source.weights_name}
        key = hash_of({**network, **sampling, "num_samples": num, "seed": request.seed, "steps": request.steps})
        self.path = _result_path(request, source, session, key=key)
        self.document = TimeSearch(
            step=source.step,
            weights=source.weights_name,
            steps=request.steps,
            last=self._last,
            score_name=session.extractor.distance_name,
            num_samples=num,
            seed=request.seed,
            protocol={**sampling, **session.machine(), "reference": reference},
            key=key,
        )
        self._written_to = self._progress.folder / f"search-{key}" if self._progress.is_anew else self.path
        self._take_up(collectives.from_main(collectives.on_main(self._earlier)))
        self._counting = Counting(  # of which lines alone are shown: each trial has a bar
            "search",
            total=most_trials(steps=request.steps, last=self._last, start=self._start),
            done=len(self.document.trials),
            unit="trials at most",
            active=session.world.is_main,
        )

    def find(self) -> Path:
        """Runs the search to its end. Collective.

        Raises:
            Interrupted: a preemption interrupted; the finished trials are kept.
        """
        steps = self.document.steps
        if self.document.complete:
            self._announce()
            return self.path
        search(self.score, steps=steps, last=self._last, start=self._start)
        best = min((trial for trial in self.document.trials if len(trial.indices) == steps), key=lambda t: t.score)
        self._written_to = self.path
        self._write(
            complete=True,
            date=utc_now(),
            indices=best.indices,
            times=best.times,
            score=best.score,
            protocol={**self.document.protocol, "num_ranks": self._session.world.num_ranks},
        )
        collectives.on_main(self._progress.close)
        return self.path

    def _announce(self) -> None:
        """Prints what an earlier search found."""
        found = self.document
        if self._session.world.is_main:
            print(f"times {_listed(found.times)}: {found.score_name} {found.score:.4g}", flush=True)
            print(f"{self.path}: searched {found.date} already; --force searches anew", file=sys.stderr, flush=True)

    @cached_property
    def _denoise(self) -> Denoise:
        return self._source.denoiser(self._session.world.device)

    def score(self, indices: Indices) -> float:
        """The Fréchet distance at these indices, from an earlier trial if there is one. Collective."""
        for trial in self.document.trials:
            if trial.indices == indices:
                return trial.score
        sigmas = indexed_sigmas(self._source.config.method, indices, last=self._last)
        draw = SampleRequest(num=self.document.num_samples, seed=self.document.seed, sigmas=sigmas)
        label = f"{describe_step(self._source)} at {_listed(sigmas.tolist())}"
        found = self._session.measure_samples(
            self._source, self._denoise, draw, work_dir=self._progress.folder, label=label
        )
        if found is None:
            raise Interrupted
        trial = Trial(indices=indices, times=tuple(sigmas.tolist()), score=found["fid"])
        self._write(trials=(*self.document.trials, trial))
        if self._session.world.is_main:
            print(f"times {_listed(sigmas.tolist())}: {self.document.score_name} {trial.score:.4g}", flush=True)
        self._counting.advance()
        return trial.score

    def _earlier(self) -> TimeSearch | None:
        """The document that this search continues. Rank 0 only.

        Raises:
            UserError: another search or something else is at the result's place, and is not to be replaced.
        """
        found = existing(TimeSearch, self.path)
        if self._progress.is_anew:
            found = existing(TimeSearch, self._written_to)
        elif found is not None and found.key != self.document.key:
            raise UserError(f"{self.path}: holds another search; give another --out, or --force to replace it")
        if found is None or not found.complete:
            Place(self.path).check_output()
        if found is not None and not found.complete and self._is_of_other_machine(found):
            return None
        return found

    def _is_of_other_machine(self, found: TimeSearch) -> bool:
        """Whether trials would be compared that differ by more than their times."""
        return any(found.protocol.get(name) != self.document.protocol[name] for name in ("torch", "device"))

    def _take_up(self, earlier: TimeSearch | None) -> None:
        """Goes on with an earlier search of the same."""
        if earlier is not None:
            self.document = earlier

    def _write(self, **changes: object) -> None:
        self.document = self.document.model_copy(update=changes)

        def write() -> None:
            must_be_there(self._source.run_dir)
            replace_durably(self._written_to, self.document.to_bytes())

        collectives.on_main(write)


def _start(config: Config) -> Indices:
    """Where the search begins, as indices on the descending grid: at the times that sampling in two steps takes now."""
    second, times = config.method.second_time, config.sampling.times
    if times is None or len(times) != 2:
        return (0, second.index)
    grid = indexed_sigmas(config.method, range(second.last + 1), last=second.last)
    return (0, max(1, int((grid.log() - math.log(times[1])).abs().argmin())))


def _result_path(request: SearchTimesRequest, source: Source, session: EvaluationSession, *, key: str) -> Path:
    if request.out is not None:
        return Path(request.out)
    if source.run_dir is None:
        raise UserError(f"{request.source}: not a run on this machine; give --out FILE.json for the result")
    return RunDir(source.run_dir).time_search(
        step=source.step,
        weights=source.weights_name,
        steps=request.steps,
        features=session.extractor.label,
        num_samples=session.settings.num_samples,
        seed=request.seed,
        reference=session.reference_sha256,
        key=key,
    )


def _listed(sigmas: Iterable[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)
