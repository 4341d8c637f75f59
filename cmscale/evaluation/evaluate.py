"""Evaluates a source: measures the requested checkpoints, weights and samplings, and writes a result for each.

An evaluation that was killed or preempted continues where it stopped, on any number of ranks, with the same result.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmscale.commands import situation
from cmscale.config import MethodSection
from cmscale.config.requests import EvaluateRequest
from cmscale.config.sampling_times import parse_counts
from cmscale.config.site import use_site
from cmscale.config.source_request import request_from
from cmscale.distributed import collectives
from cmscale.distributed import world as worlds
from cmscale.distributed.world import World
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation.finished_samples import evaluate_images
from cmscale.evaluation.kept import KeptSets, nfe_of
from cmscale.evaluation.outcome import known_result, make_result, print_result, summary, write_result
from cmscale.evaluation.progress import Progress, must_be_there, work_folder
from cmscale.evaluation.session import (
    TIMEOUT_MINUTES,
    EvaluationSession,
    describe_step,
    with_classes,
)
from cmscale.generation.draw import SampleRequest, protocol_of, used_sigmas
from cmscale.io.place import Place
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event
from cmscale.runs.results import EvaluationResult, hash_of
from cmscale.runs.source_kind import kind_of_source
from cmscale.source import Source, check_choices, dataset_of, load_source


def draws_of(request: EvaluateRequest, method: MethodSection, *, num: int) -> list[SampleRequest]:
    """The samplings that a request asks for, with seed 0: one per number of steps, or one at the given times."""
    if request.times is not None:
        return [SampleRequest(num=num).with_files(noise=None, times=request.times, shape=(), method=method)]
    steps = [None] if request.steps is None else parse_counts(request.steps)
    return [SampleRequest(num=num, steps=each) for each in steps]


def sources_of(request: EvaluateRequest) -> Iterator[Source]:
    """Every requested checkpoint with each of the requested weights."""
    for step in request.steps_asked:
        for weights in request.weights_asked:
            yield load_source(
                request.source,
                weights=weights,
                step=step,
                config=request.config,
                overrides=request.overrides,
            )


def main(request: dict[str, Any]) -> str:
    """Evaluates on all ranks of a job. Returns `finished`, or `preempted` (finished blocks are kept)."""
    use_site(interactive=False)
    wanted = request_from(EvaluateRequest, request)
    preemption = Preemption.install()
    world = worlds.detect(wanted.device)
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        done = evaluate(wanted, world, preemption=preemption)
    for path in (done or []) if world.is_main else []:
        print(path, flush=True)
    return "preempted" if done is None else "finished"


def run_here(request: EvaluateRequest) -> list[Place] | None:
    """Evaluates in this process, which may be one of torchrun's ranks; also measures finished samples.

    Returns:
        The results' files; None if a signal interrupted.
    """
    kind = kind_of_source(request.source)
    request.refuse_unused(source=kind)
    world = worlds.detect(request.device)
    if kind == situation.SAMPLES:
        if world.num_ranks > 1:
            raise UserError(f"{request.source}: finished samples are measured by one process, not {world.num_ranks}")
        return [evaluate_images(request, world, preemption=Preemption())]  # without handlers: Ctrl-C ends it
    preemption = Preemption.install()
    with worlds.joined(world, timeout_minutes=TIMEOUT_MINUTES):
        return evaluate(request, world, preemption=preemption)


def evaluate(request: EvaluateRequest, world: World, *, preemption: Preemption) -> list[Place] | None:
    """Evaluates every requested checkpoint with the requested weights and samplings. Collective.

    Returns:
        The results' files; None if a preemption interrupted.
    """
    request.refuse_several_in_one_file()
    check_choices(request.source, steps=request.steps_asked, weights=request.weights_asked)
    session: EvaluationSession | None = None
    done: list[Place] = []
    homes: set[Path] = set()
    with worlds.same_arithmetic(world.device):
        for source in sources_of(request):
            evaluating, data = source.config.evaluate, source.config.data.path
            for draw in draws_of(request, source.config.method, num=1):
                used_sigmas(source, draw)  # refuses times before anything is measured
            session = session or EvaluationSession.build(request, evaluating, world, data=data, preemption=preemption)
            for draw in draws_of(request, source.config.method, num=session.settings.num_samples):
                path = _evaluate_one(request, source, session, draw)
                if path is None:
                    return None
                done.append(path)
                homes.add(work_folder(source, request.run_dir))
    collectives.on_main(lambda: [Progress.of(request, home).close() for home in homes])
    return done


def _evaluate_one(
    request: EvaluateRequest, source: Source, session: EvaluationSession, draw: SampleRequest
) -> Place | None:
    """Evaluates one network in one sampling, over all seeds; a result that exists is returned as it is. Collective."""
    started = time.monotonic()
    session.refuse_other_size(source)
    network = {"step": source.step, "weights": source.weights_name}
    key = hash_of({**network, **session.identity(source, draw), "num_samples": draw.num, "seeds": request.seeds})
    out = _result_path(request, source, session, draw, key=key)
    progress = Progress.of(request, work_folder(source, request.run_dir))
    title = describe_step(source)

    kept = KeptSets(request, source, session, draw)

    def is_known() -> bool:
        if known_result(out, key=key, progress=progress, title=title, lacks=kept.differ) is not None:
            return True
        out.check_output()
        return False

    if collectives.from_main(collectives.on_main(is_known)):
        return out
    denoise = source.denoiser(session.world.device)
    measured = []
    for seed in range(request.seeds):
        one = replace(draw, seed=seed)
        label = f"{title} seed {seed}"
        with kept.opened(seed) as making:
            found = session.measure_samples(source, denoise, one, work_dir=progress.folder, label=label, kept=making)
        if found is None:
            return None
        measured.append(found)
    seconds = time.monotonic() - started

    def write() -> None:
        result = _result(source, session, draw, measured, key=key, seconds=seconds, kept=kept.records())
        must_be_there(source.run_dir)
        write_result(result, out)
        progress.finish(key)
        print_result(result, title=title)
        if source.run_dir is not None:
            write_event(RunDir(source.run_dir), "evaluated", step=source.step, rank=0, why=summary(result))

    collectives.on_main(write)
    return out


def _result(
    source: Source,
    session: EvaluationSession,
    draw: SampleRequest,
    measured: list[dict[str, float]],
    *,
    key: str,
    seconds: float,
    kept: Sequence[dict[str, Any]],
) -> EvaluationResult:
    reference, data, size = session.reference, dataset_of(source), source.config.model.image_size
    assert reference is not None, "rank 0 has the reference"
    preprocess, encoding, exif = (None,) * 3 if data is None else (data.preprocess, data.encoding, data.exif)
    made = {"preprocess": preprocess, "encoding": encoding, "exif": exif}
    return make_result(
        session,
        measured,
        num_samples=draw.num,
        key=key,
        seconds=seconds,
        protocol={
            "source": source.origin,
            **protocol_of(source, with_classes(source, draw)),
            "data": data and {"fingerprint": data.fingerprint, **made},
        },
        comparison=reference.mismatches(preprocess=preprocess, encoding=encoding, exif=exif, size=(size, size)),
        step=source.step,
        weights=source.weights_name,
        nfe=nfe_of(source.config, draw),
        kept_samples=tuple(kept),
        times=None if draw.sigmas is None else tuple(draw.sigmas.tolist()),
    )


def _result_path(
    request: EvaluateRequest, source: Source, session: EvaluationSession, draw: SampleRequest, *, key: str
) -> Place:
    """Where the result goes: `--out`, or the run's evaluations folder."""
    if request.out is not None:
        return Place(request.out)
    home = source.run_dir or (None if request.run_dir is None else Path(request.run_dir))
    if home is None:
        raise UserError(f"{request.source}: not a run on this machine; give --out FILE.json for the result")
    file = RunDir(home).evaluation(
        step=source.step,
        weights=source.weights_name,
        nfe=nfe_of(source.config, draw),
        times=() if draw.sigmas is None else draw.sigmas.tolist(),
        features=session.extractor.label,
        num_samples=draw.num,
        seeds=request.seeds,
        reference=session.reference_sha256,
        key=key,
    )
    return Place(file)
