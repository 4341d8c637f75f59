"""Evaluates a source: measures the requested checkpoints, weights and samplings, and writes a result for each.

An evaluation that was killed or preempted continues where it stopped, on any number of ranks, with the same result.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from cmscale.config import Config, Evaluate
from cmscale.config.requests import EvaluateRequest
from cmscale.consistency.sampler import num_evaluations
from cmscale.distributed import collectives
from cmscale.distributed import world as worlds
from cmscale.distributed.world import World
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation.measure import image_blocks, left_out, measure
from cmscale.evaluation.metrics.frechet import FID
from cmscale.evaluation.metrics.registry import all_metrics, result_keys
from cmscale.evaluation.sample_files import open_images
from cmscale.evaluation.session import (
    TIMEOUT_MINUTES,
    EvaluationSession,
    describe_step,
    machine_protocol,
    sampling_protocol,
    work_folder,
)
from cmscale.generation.draw import SampleRequest
from cmscale.io.storage import open_parent
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event
from cmscale.runs.results import EvaluationResult, combine
from cmscale.source import Source, checkpoint_step, dataset_of, load_source


def draws_of(request: EvaluateRequest, *, num: int) -> list[SampleRequest]:
    """The samplings that a request asks for, with seed 0: one per number of steps, or one at the given times."""
    if request.times is not None:
        if request.steps is not None:
            raise UserError(f"--steps {request.steps}: --times gives the number of steps; leave one of them out")
        return [SampleRequest(num=num).with_files(noise=None, times=request.times, shape=())]
    steps = [None] if request.steps is None else _numbers(request.steps, flag="--steps")
    return [SampleRequest(num=num, steps=each) for each in steps]


def sources_of(request: EvaluateRequest) -> Iterator[Source]:
    """Every requested checkpoint with each of the requested weights."""
    for part in request.checkpoints.split(","):
        for weights in _weights(request):
            yield load_source(
                request.source,
                weights=weights,
                step=checkpoint_step(part),
                config=request.config,
                overrides=request.overrides,
            )


def _weights(request: EvaluateRequest) -> list[str | None]:
    return [None] if request.weights is None else [name.strip() for name in request.weights.split(",")]


def _count(request: EvaluateRequest) -> int:
    """The number of evaluations that a request asks for."""
    steps = 1 if request.steps is None else len(request.steps.split(","))
    return len(request.checkpoints.split(",")) * len(_weights(request)) * steps


def main(request: dict[str, Any]) -> str:
    """Evaluates on all ranks of a job. Returns `finished`, or `preempted` (finished blocks are kept)."""
    try:
        wanted = EvaluateRequest.model_validate(request)
    except ValidationError as error:
        raise UserError(f"evaluation request: {error.errors(include_url=False)[0]['msg']}") from None
    preemption = Preemption.install()
    world = worlds.detect(wanted.device)
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        done = evaluate(wanted, world, preemption=preemption)
    for path in (done or []) if world.is_main else []:
        print(path, flush=True)
    return "preempted" if done is None else "finished"


def run_here(request: EvaluateRequest) -> list[Path] | None:
    """Evaluates in this process, which may be one of torchrun's ranks; also measures finished samples.

    Returns:
        The results' files; None if a signal interrupted.
    """
    preemption = Preemption.install()
    world = worlds.detect(request.device)
    if _is_finished_samples(request.source):
        if world.num_ranks > 1:
            raise UserError(f"{request.source}: finished samples are measured by one process, not {world.num_ranks}")
        return [evaluate_images(request, world, preemption=preemption)]
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        return evaluate(request, world, preemption=preemption)


def evaluate(request: EvaluateRequest, world: World, *, preemption: Preemption) -> list[Path] | None:
    """Evaluates every requested checkpoint with the requested weights and samplings. Collective.

    Returns:
        The results' files; None if a preemption interrupted.
    """
    if request.out is not None and _count(request) > 1:
        raise UserError(f"--out {request.out}: one file can't hold {_count(request)} evaluations; ask for one")
    session: EvaluationSession | None = None
    done = []
    with worlds.same_arithmetic(world.device):
        for source in sources_of(request):
            evaluating, data = source.config.evaluate, source.config.data.path
            session = session or EvaluationSession.build(request, evaluating, world, data=data, preemption=preemption)
            for draw in draws_of(request, num=session.settings.num_samples):
                path = _evaluate_one(request, source, session, draw)
                if path is None:
                    return None
                done.append(path)
    return done


def _evaluate_one(
    request: EvaluateRequest, source: Source, session: EvaluationSession, draw: SampleRequest
) -> Path | None:
    """Evaluates one network in one sampling, over all seeds. Collective."""
    started = time.monotonic()
    out = _result_path(request, source, draw)
    collectives.on_main(lambda: _check_fit(source, session))
    denoise = source.denoiser(session.world.device)
    work_dir = work_folder(source, request.run_dir)
    measured = []
    for seed in range(request.seeds):
        label = f"{describe_step(source)} seed {seed}"
        found = session.measure_samples(source, denoise, replace(draw, seed=seed), work_dir=work_dir, label=label)
        if found is None:
            return None
        measured.append(found)
    seconds = time.monotonic() - started
    collectives.on_main(lambda: _write_result(source, session, draw, measured, out=out, seconds=seconds))
    return out


def _check_fit(source: Source, session: EvaluationSession) -> None:
    size = source.config.model.image_size
    assert session.reference is not None, "rank 0 has the reference"
    session.reference.refuse_other_size((size, size), of="the model")


def _write_result(
    source: Source,
    session: EvaluationSession,
    draw: SampleRequest,
    measured: list[dict[str, float]],
    *,
    out: Path,
    seconds: float,
) -> None:
    reference = session.reference
    assert reference is not None, "rank 0 has the reference"
    data, metrics = dataset_of(source), combine(measured)
    result = EvaluationResult(
        step=source.step,
        weights=source.weights_name,
        nfe=_nfe(source.config, draw),
        times=None if draw.sigmas is None else tuple(draw.sigmas.tolist()),
        num_samples=draw.num,
        seeds=tuple(range(len(measured))),
        features=session.extractor.label,
        score_name=session.extractor.distance_name,
        reference=reference.describe(),
        seconds=round(seconds, 3),
        protocol={
            "source": source.origin,
            **sampling_protocol(source, draw),
            **session.features_protocol(),
            **machine_protocol(session.world),
            "data": None if data is None else {"fingerprint": data.fingerprint, "preprocess": data.preprocess},
        },
        warnings=(
            *reference.mismatches(preprocess=None if data is None else data.preprocess),
            *reference.notes,
            *left_out(metrics, reference=reference),
        ),
        metrics=metrics,
        not_measured=_not_measured(metrics),
    )
    storage, key = open_parent(out)
    storage.write(key, result.to_bytes())
    print(f"{describe_step(source)}: {summary(result)}", flush=True)
    if source.run_dir is not None:
        write_event(RunDir(source.run_dir), "evaluated", step=source.step, rank=0, why=summary(result))


def evaluate_images(request: EvaluateRequest, world: World, *, preemption: Preemption) -> Path:
    """Evaluates finished samples: an `.npz` with `arr_0`, or a folder of images."""
    started = time.monotonic()
    images = open_images(request.source)
    session = EvaluationSession.build(request, Evaluate(), world, data=None, preemption=preemption)
    reference = session.reference
    assert reference is not None, "a world of one has the reference"
    reference.refuse_other_size((images.height, images.width), of=request.source)
    blocks = image_blocks(images.read(), session.extractor)
    metrics = combine([measure(blocks, num_samples=images.count, reference=reference)])
    result = EvaluationResult(
        num_samples=images.count,
        seeds=(0,),
        features=session.extractor.label,
        score_name=session.extractor.distance_name,
        reference=reference.describe(),
        seconds=round(time.monotonic() - started, 3),
        protocol={"source": images.name, **session.features_protocol(), **machine_protocol(world)},
        warnings=(*images.notes(), *reference.notes, *left_out(metrics, reference=reference)),
        metrics=metrics,
        not_measured=_not_measured(metrics),
    )
    out = Path(request.out or f"{Path(request.source).stem}-evaluation.json")
    storage, key = open_parent(out)
    storage.write(key, result.to_bytes())
    print(summary(result))
    return out


def _not_measured(metrics: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in result_keys() if name not in metrics)


def summary(result: EvaluationResult) -> str:
    """The result in one line."""
    parts = []
    for metric in all_metrics():
        if (measured := result.metrics.get(metric.name)) is not None:
            title = result.score_name if metric.name == FID.name else metric.title
            parts.append(f"{title} {measured.mean:{metric.format}}")
    nfe = "" if result.nfe is None else f", NFE {result.nfe}"
    return f"{', '.join(parts)} ({result.num_samples} samples{nfe})"


def _result_path(request: EvaluateRequest, source: Source, draw: SampleRequest) -> Path:
    """Where the result goes: `--out`, or the run's evaluations folder."""
    if request.out is not None:
        return Path(request.out)
    home = source.run_dir or (None if request.run_dir is None else Path(request.run_dir))
    if home is None:
        raise UserError(f"{request.source}: not a run on this machine; give --out FILE.json for the result")
    return RunDir(home).evaluation(
        step=source.step,
        weights=source.weights_name,
        nfe=_nfe(source.config, draw),
        times=() if draw.sigmas is None else draw.sigmas.tolist(),
    )


def _nfe(config: Config, draw: SampleRequest) -> int:
    steps = draw.steps if draw.sigmas is None else int(torch.count_nonzero(draw.sigmas))
    default = config.method.default_sampling_steps
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
