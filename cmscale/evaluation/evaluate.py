"""Evaluates a source: which checkpoints, weights and times are measured, and the document that each leaves.

An evaluation that is killed or preempted goes on where it was, on any number of ranks, with the same result.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from cmscale.config import Config, Evaluate
from cmscale.consistency.sampler import num_evaluations
from cmscale.distributed import collectives
from cmscale.distributed import world as worlds
from cmscale.distributed.world import World
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation.images import open_images
from cmscale.evaluation.measure import image_blocks, left_out, measure
from cmscale.evaluation.session import (
    TIMEOUT_MINUTES,
    Bench,
    MeasuringRequest,
    describe_step,
    machine_protocol,
    sampling_protocol,
    work_folder,
)
from cmscale.generation.draw import SampleRequest
from cmscale.io.storage import open_parent
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event
from cmscale.runs.results import EvaluationResult, combine, score_name
from cmscale.source import Source, dataset_of, load_source


class Request(MeasuringRequest):
    """What to evaluate and how. Lists are written `1,2`."""

    out: str | None = None
    steps: str | None = None
    times: str | None = None
    seeds: int = 1
    checkpoints: str = "latest"
    run_dir: str | None = None
    """Where results and progress go for a source that is no run; on a cluster all nodes see it."""

    def draws(self, *, num: int) -> list[SampleRequest]:
        """The ways of sampling asked for, seed 0: each number of steps, or the given times."""
        if self.times is not None:
            if self.steps is not None:
                raise UserError(f"--steps {self.steps}: --times says how many steps there are; leave one out")
            return [SampleRequest(num=num).with_files(noise=None, times=self.times, shape=())]
        steps = [None] if self.steps is None else _numbers(self.steps, flag="--steps")
        return [SampleRequest(num=num, steps=each) for each in steps]

    def sources(self) -> Iterator[Source]:
        """Every checkpoint asked for with every weights asked for."""
        for part in self.checkpoints.split(","):
            step = None if part == "latest" else _numbers(part, flag="--step")[0]
            for weights in self.weights_list:
                yield load_source(self.source, weights=weights, step=step, config=self.config, overrides=self.overrides)

    @property
    def weights_list(self) -> list[str | None]:
        return [None] if self.weights is None else [name.strip() for name in self.weights.split(",")]

    @property
    def count(self) -> int:
        """How many evaluations that makes."""
        steps = 1 if self.steps is None else len(self.steps.split(","))
        return len(self.checkpoints.split(",")) * len(self.weights_list) * steps


def main(request: dict[str, Any]) -> str:
    """Evaluates on all ranks of a job. Returns `finished` or `preempted` (the blocks so far are kept)."""
    try:
        wanted = Request.model_validate(request)
    except ValidationError as error:
        raise UserError(f"evaluation request: {error.errors(include_url=False)[0]['msg']}") from None
    preemption = Preemption.install()
    world = worlds.detect(wanted.device)
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        done = evaluate(wanted, world, preemption=preemption)
    for path in (done or []) if world.is_main else []:
        print(path, flush=True)
    return "preempted" if done is None else "finished"


def run_here(request: Request) -> list[Path] | None:
    """Evaluates in this process, alone or as one of torchrun's ranks, finished samples too.

    Returns:
        The results' files; None where a signal interrupted.
    """
    preemption = Preemption.install()
    world = worlds.detect(request.device)
    if _is_finished_samples(request.source):
        if world.num_ranks > 1:
            raise UserError(f"{request.source}: finished samples are measured by one process, not {world.num_ranks}")
        return [evaluate_images(request, world, preemption=preemption)]
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        return evaluate(request, world, preemption=preemption)


def evaluate(request: Request, world: World, *, preemption: Preemption) -> list[Path] | None:
    """Every asked checkpoint with every asked weights at every asked number of steps. Collective.

    Returns:
        The results' files, or None where a preemption came between.
    """
    if request.out is not None and request.count > 1:
        raise UserError(f"--out {request.out}: one file can't hold {request.count} evaluations; ask for one")
    bench: Bench | None = None
    done = []
    with worlds.same_arithmetic(world.device):
        for source in request.sources():
            evaluating, data = source.config.evaluate, source.config.data.path
            bench = bench or Bench.build(evaluating, world, given=request.given(), data=data, preemption=preemption)
            for draw in request.draws(num=bench.settings.num_samples):
                path = _evaluate_one(request, source, bench, draw)
                if path is None:
                    return None
                done.append(path)
    return done


def _evaluate_one(request: Request, source: Source, bench: Bench, draw: SampleRequest) -> Path | None:
    """One network sampled in one way, over all seeds. Collective."""
    started = time.monotonic()
    out = _result_path(request, source, draw)
    collectives.on_main(lambda: _check_fit(source, bench))
    denoise = source.denoiser(bench.world.device)
    work_dir = work_folder(source, request.run_dir)
    measured = []
    for seed in range(request.seeds):
        label = f"{describe_step(source)} seed {seed}"
        found = bench.measure_samples(source, denoise, replace(draw, seed=seed), work_dir=work_dir, label=label)
        if found is None:
            return None
        measured.append(found)
    seconds = time.monotonic() - started
    collectives.on_main(lambda: _write_result(source, bench, draw, measured, out=out, seconds=seconds))
    return out


def _check_fit(source: Source, bench: Bench) -> None:
    size = source.config.model.image_size
    assert bench.reference is not None, "rank 0 has the reference"
    bench.reference.refuse_other_size((size, size), whose="the model")


def _write_result(
    source: Source,
    bench: Bench,
    draw: SampleRequest,
    measured: list[dict[str, float]],
    *,
    out: Path,
    seconds: float,
) -> None:
    reference = bench.reference
    assert reference is not None, "rank 0 has the reference"
    data = dataset_of(source)
    result = EvaluationResult(
        step=source.step,
        weights=source.weights_name,
        nfe=_nfe(source.config, draw),
        times=None if draw.sigmas is None else tuple(draw.sigmas.tolist()),
        num_samples=draw.num,
        seeds=tuple(range(len(measured))),
        features=bench.extractor.label,
        score_name=score_name(bench.extractor.label),
        reference=reference.describe(),
        seconds=round(seconds, 3),
        protocol={
            "source": source.origin,
            **sampling_protocol(source, draw),
            **bench.features_protocol(),
            **machine_protocol(bench.world),
            "data": None if data is None else {"fingerprint": data.fingerprint, "preprocess": data.preprocess},
        },
        warnings=(
            *reference.mismatches(preprocess=None if data is None else data.preprocess),
            *left_out(reference, num_samples=draw.num, features=bench.extractor.label),
        ),
        **as_fields(measured),
    )
    storage, key = open_parent(out)
    storage.write(key, result.to_bytes())
    print(f"{describe_step(source)}: {summary(result)}", flush=True)
    if source.run_dir is not None:
        write_event(RunDir(source.run_dir), "evaluated", step=source.step, rank=0, why=summary(result))


def evaluate_images(request: Request, world: World, *, preemption: Preemption) -> Path:
    """Finished samples, anybody's: an `.npz` with `arr_0`, or a folder of images."""
    started = time.monotonic()
    images = open_images(request.source)
    bench = Bench.build(Evaluate(), world, given=request.given(), data=None, preemption=preemption)
    reference = bench.reference
    assert reference is not None, "a world of one has the reference"
    reference.refuse_other_size((images.height, images.width), whose=request.source)
    blocks = image_blocks(images.read(), bench.extractor)
    measured = measure(blocks, num_samples=images.count, reference=reference)
    result = EvaluationResult(
        num_samples=images.count,
        seeds=(0,),
        features=bench.extractor.label,
        score_name=score_name(bench.extractor.label),
        reference=reference.describe(),
        seconds=round(time.monotonic() - started, 3),
        protocol={"source": images.name, **bench.features_protocol(), **machine_protocol(world)},
        warnings=tuple(left_out(reference, num_samples=images.count, features=bench.extractor.label)),
        **as_fields([measured]),
    )
    out = Path(request.out or f"{Path(request.source).stem}-evaluation.json")
    storage, key = open_parent(out)
    storage.write(key, result.to_bytes())
    print(summary(result))
    return out


def as_fields(measured: list[dict[str, float]]) -> dict[str, Any]:
    """The metrics over all sets, as fields of the result."""
    return dict(combine(measured))


def summary(result: EvaluationResult) -> str:
    """The result in a line."""
    parts = [f"{result.score_name} {result.fid.mean:.4g}"]
    for name in ("precision", "recall"):
        metric = getattr(result, name)
        if metric is not None:
            parts.append(f"{name} {metric.mean:.3f}")
    nfe = "" if result.nfe is None else f", NFE {result.nfe}"
    return f"{', '.join(parts)} ({result.num_samples} samples{nfe})"


def _result_path(request: Request, source: Source, draw: SampleRequest) -> Path:
    """Where the result goes: `--out`, or the run's evaluations folder."""
    if request.out is not None:
        return Path(request.out)
    home = source.run_dir or (None if request.run_dir is None else Path(request.run_dir))
    if home is None:
        raise UserError(f"{request.source}: not a run on this machine; say where the result goes with --out FILE.json")
    return RunDir(home).evaluation(
        step=source.step,
        weights=source.weights_name,
        nfe=_nfe(source.config, draw),
        times=() if draw.sigmas is None else draw.sigmas.tolist(),
    )


def _nfe(config: Config, draw: SampleRequest) -> int:
    steps = draw.steps if draw.sigmas is None else int(torch.count_nonzero(draw.sigmas))
    default = config.method.sampler_steps if config.method.kind == "edm" else 1
    return num_evaluations(config.method, steps or default, draw.sampler)


def _numbers(text: str, *, flag: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= (flag == "--steps") for part in parts):
        raise UserError(f"{flag}: got {text!r}; write whole numbers, 1,2")
    return [int(part) for part in parts]


def _is_finished_samples(source: str) -> bool:
    """An `.npz`, or a folder that is neither run nor checkpoint nor exported model but holds images."""
    if source.endswith(".npz"):
        return True
    path = Path(source)
    known = ("config.yaml", "manifest.json", "model_index.json", "checkpoints")
    return path.is_dir() and not any((path / name).exists() for name in known)
