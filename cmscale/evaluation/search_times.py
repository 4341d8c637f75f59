"""Searches the sampling times of a source: each trial is measured on all ranks and stored, and never repeated."""

import contextlib
from pathlib import Path

import torch

from cmscale.config.requests import SearchTimesRequest
from cmscale.consistency.grid import indexed_sigmas
from cmscale.consistency.solver import Denoise
from cmscale.distributed import collectives
from cmscale.distributed import world as worlds
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation.session import (
    TIMEOUT_MINUTES,
    EvaluationSession,
    describe_step,
    machine_protocol,
    sampling_protocol,
    work_folder,
)
from cmscale.evaluation.ternary_search import Indices, search
from cmscale.generation.draw import SampleRequest
from cmscale.io.durable import replace_durably
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import read_document
from cmscale.runs.results import TimeSearch, Trial
from cmscale.source import Source, checkpoint_step, load_source


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
        return Trials(request, source, session, denoise=source.denoiser(world.device)).find()
    return None


class Trials:
    """One search. Its document is written after every trial."""

    def __init__(
        self, request: SearchTimesRequest, source: Source, session: EvaluationSession, *, denoise: Denoise
    ) -> None:
        self._source = source
        self._session = session
        self._denoise = denoise
        second = source.config.method.second_time
        self._start, self._last = (0, second.index), second.last
        self._work_dir = work_folder(source, None)
        self.path = _result_path(request, source)
        reference = collectives.from_main(None if session.reference is None else session.reference.describe())
        sampling = sampling_protocol(source, SampleRequest(num=session.settings.num_samples))
        del sampling["sigmas"]  # each trial has its own
        self.document = TimeSearch(
            step=source.step,
            weights=source.weights_name,
            steps=request.steps,
            last=self._last,
            score_name=session.extractor.distance_name,
            num_samples=session.settings.num_samples,
            seed=request.seed,
            protocol={**sampling, **session.features_protocol(), "reference": reference},
        )
        self._take_up(
            collectives.from_main(self.path.read_bytes() if session.world.is_main and self.path.exists() else None)
        )

    def find(self) -> Path:
        """Runs the search to its end. Collective.

        Raises:
            Interrupted: a preemption interrupted; the finished trials are kept.
        """
        steps = self.document.steps
        search(self.score, steps=steps, last=self._last, start=self._start)
        best = min((trial for trial in self.document.trials if len(trial.indices) == steps), key=lambda t: t.score)
        machine = machine_protocol(self._session.world)
        self._write(
            complete=True,
            indices=best.indices,
            times=best.times,
            score=best.score,
            protocol={**self.document.protocol, **machine},
        )
        return self.path

    def score(self, indices: Indices) -> float:
        """The Fréchet distance at these indices, from an earlier trial if there is one. Collective."""
        for trial in self.document.trials:
            if trial.indices == indices:
                return trial.score
        sigmas = indexed_sigmas(self._source.config.method, indices, last=self._last)
        draw = SampleRequest(num=self.document.num_samples, seed=self.document.seed, sigmas=sigmas)
        label = f"{describe_step(self._source)} at {_written(sigmas)}"
        found = self._session.measure_samples(self._source, self._denoise, draw, work_dir=self._work_dir, label=label)
        if found is None:
            raise Interrupted
        trial = Trial(indices=indices, times=tuple(sigmas.tolist()), score=found["fid"])
        self._write(trials=(*self.document.trials, trial))
        if self._session.world.is_main:
            print(f"times {_written(sigmas)}: {self.document.score_name} {trial.score:.4g}", flush=True)
        return trial.score

    def _take_up(self, raw: bytes | None) -> None:
        """Reuses the trials of an earlier search that measured the same network in the same way."""
        if raw is None:
            return
        old = read_document(TimeSearch, raw, origin=str(self.path))
        mine = self.document.model_dump(mode="json")
        theirs = old.model_dump(mode="json")
        shared = ("step", "weights", "last", "score_name", "num_samples", "seed")
        same = all(mine[key] == theirs[key] for key in shared)
        if same and all(theirs["protocol"].get(key) == value for key, value in mine["protocol"].items()):
            self.document = self.document.model_copy(update={"trials": old.trials})

    def _write(self, **changes: object) -> None:
        self.document = self.document.model_copy(update=changes)
        collectives.on_main(lambda: replace_durably(self.path, self.document.to_bytes()))


def _result_path(request: SearchTimesRequest, source: Source) -> Path:
    if request.out is not None:
        return Path(request.out)
    if source.run_dir is None:
        raise UserError(f"{request.source}: not a run on this machine; give --out FILE.json for the result")
    return RunDir(source.run_dir).time_search(step=source.step, weights=source.weights_name, steps=request.steps)


def _written(sigmas: torch.Tensor) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas.tolist())
