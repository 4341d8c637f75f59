"""Evaluates a source: every rank samples and measures its blocks of seeds, rank 0 turns them into numbers.

The blocks are committed one by one, so an evaluation that is killed or preempted goes on where it was, on any
number of ranks, with the same result.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.progress import track

from cmscale import __version__
from cmscale import world as worlds
from cmscale.assets import cache_folder, local_file
from cmscale.config import Config, Evaluate
from cmscale.consistency.sampler import num_evaluations
from cmscale.data import read_images
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation.blocks import BlockStore
from cmscale.evaluation.features import FeatureExtractor, build_features
from cmscale.evaluation.images import open_images
from cmscale.evaluation.measure import image_blocks, left_out, measure
from cmscale.evaluation.reference import Reference, read_reference, reference_from_images
from cmscale.evaluation.result import EvaluationResult, combine, score_name
from cmscale.manifests import DATASET_MANIFEST, read_dataset_manifest
from cmscale.metrics_log import write_event
from cmscale.pictures import to_uint8
from cmscale.rundir import RunDir, step_name
from cmscale.sampling import SampleRequest, draw_batch
from cmscale.source import Source, dataset_of, load_source
from cmscale.storage import open_parent, open_storage
from cmscale.world import World

MAX_REFERENCE_IMAGES = 50_000  # measured on the spot; larger data sets want data_prep/reference.py once


class Request(BaseModel):
    """What to evaluate and how; `None` leaves a value to the source's config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    reference: str | None = None
    out: str | None = None
    samples: int | None = None
    steps: str | None = None
    seeds: int = 1
    features: str | None = None
    inception_weights: str | None = None
    batch_size: int | None = None
    weights: str | None = None
    checkpoints: str = "latest"
    config: str | None = None
    overrides: list[str] = []
    device: str = "auto"
    work_dir: str | None = None

    @property
    def steps_list(self) -> list[int | None]:
        return [None] if self.steps is None else list(_numbers(self.steps, flag="--steps"))

    @property
    def checkpoint_list(self) -> list[int | None]:
        """Steps of checkpoints; None is the newest."""
        return [None if part == "latest" else _numbers(part, flag="--step")[0] for part in self.checkpoints.split(",")]


def main(request: dict[str, Any]) -> str:
    """Evaluates on all ranks of a job. Returns `finished` or `preempted` (the blocks so far are kept)."""
    try:
        wanted = Request.model_validate(request)
    except ValidationError as error:
        raise UserError(f"evaluation request: {error.errors(include_url=False)[0]['msg']}") from None
    preemption = Preemption.install()
    world = worlds.detect(wanted.device)
    worlds.connect(world, timeout_minutes=120.0)  # rank 0 measures a reference while the others wait
    try:
        for path in evaluate(wanted, world, preemption=preemption) or []:
            if world.is_main:
                print(path, flush=True)
        return "preempted" if preemption.requested() else "finished"
    finally:
        worlds.disconnect()


def run_here(request: Request) -> list[Path]:
    """Evaluates in this process alone, finished samples too. Returns the result's files."""
    preemption = Preemption.install()
    world = worlds.detect(request.device)
    if _is_finished_samples(request.source):
        return [evaluate_images(request, world)]
    return evaluate(request, world, preemption=preemption) or []


def evaluate(request: Request, world: World, *, preemption: Preemption) -> list[Path] | None:
    """Every asked checkpoint at every asked number of steps. Collective.

    Returns:
        The results' files, or None where a preemption came between.
    """
    bench: Bench | None = None
    done = []
    for step in request.checkpoint_list:
        source = load_source(
            request.source, weights=request.weights, step=step, config=request.config, overrides=request.overrides
        )
        bench = bench or Bench.build(request, source.config.evaluate, world, data=source.config.data.path)
        for steps in request.steps_list:
            path = _evaluate_one(request, source, bench, steps=steps, preemption=preemption)
            if path is None:
                return None
            done.append(path)
    return done


@dataclass(frozen=True)
class Bench:
    """What all evaluations of one call share: features, and on rank 0 the reference."""

    world: World
    settings: Evaluate
    extractor: FeatureExtractor
    reference: Reference | None

    @classmethod
    def build(cls, request: Request, settings: Evaluate, world: World, *, data: str | None) -> "Bench":
        """The request's values before the config's; the training data where neither names a reference. Collective."""
        given = {
            "features": request.features,
            "inception_weights": request.inception_weights,
            "reference": request.reference,
            "num_samples": request.samples,
            "batch_size": request.batch_size,
        }
        settings = settings.model_copy(update={key: value for key, value in given.items() if value is not None})
        weights = None if settings.inception_weights is None else local_file(settings.inception_weights)
        extractor = build_features(settings.features, weights=weights, device=world.device)
        reference = worlds.on_main(lambda: load_reference(settings.reference or data, extractor))
        return cls(world, settings, extractor, reference)

    def measure(self, store: BlockStore, *, num_samples: int) -> dict[str, float]:
        """The metrics of a complete store; for rank 0, which has the reference."""
        assert self.reference is not None
        return measure(store.read(), num_samples=num_samples, reference=self.reference)


def load_reference(named: str | None, extractor: FeatureExtractor) -> Reference:
    """The statistics that `named` holds, or those of the images there.

    Raises:
        UserError: nothing is named, nothing is there, or more images than are measured on the spot.
    """
    if named is None:
        raise UserError("evaluate: nothing to compare with; give --reference DATASET|FOLDER|FILE.npz")
    if named.endswith((".npz", ".pkl", ".pt", ".pth")):
        return read_reference(local_file(named), extractor)
    storage = open_storage(named)
    if storage.read_if_present(DATASET_MANIFEST) is None:
        return read_reference(named, extractor)
    manifest = read_dataset_manifest(storage)
    if manifest.count > MAX_REFERENCE_IMAGES:
        raise UserError(
            f"{named}: {manifest.count} images are too many to measure on the spot; "
            "make statistics once with data_prep/reference.py and give them as --reference"
        )
    return reference_from_images(
        (image for image, _ in read_images(named)),
        extractor,
        name=f"{named} {manifest.fingerprint[:12]}",
        count=manifest.count,
        preprocess=manifest.preprocess,
    )


def _evaluate_one(
    request: Request, source: Source, bench: Bench, *, steps: int | None, preemption: Preemption
) -> Path | None:
    """One checkpoint at one number of steps, over all seeds. Collective."""
    started = time.monotonic()
    config, world = source.config, bench.world
    denoise = source.denoiser(world.device)
    out = _result_path(request, source, nfe=_nfe(config, steps))
    number = bench.settings.num_samples
    measured = []
    for seed in range(request.seeds):
        draw = SampleRequest(num=number, steps=steps, seed=seed, batch_size=bench.settings.batch_size)
        identity = {**_protocol(source, bench, draw), "seed": seed}
        store = BlockStore(_work_dir(request, source), identity=identity, num_samples=number)
        todo = worlds.from_main(store.missing())
        mine = todo[world.rank :: world.num_ranks]
        label = f"{step_name(source.step)} seed {seed}"
        for block in track(mine, description=label, disable=not (world.is_main and sys.stderr.isatty())):
            if preemption.flagged:
                break
            store.commit(block, bench.extractor(_draw_block(source, denoise, draw, block, device=world.device)))
        if preemption.requested():
            return None
        found = worlds.on_main(lambda store=store: bench.measure(store, num_samples=number))
        if found is not None:
            measured.append(found)
            store.remove()
    worlds.on_main(
        lambda: _write_result(
            request, source, bench, measured, out=out, steps=steps, seconds=time.monotonic() - started
        )
    )
    return out


def _draw_block(
    source: Source, denoise: Any, draw: SampleRequest, block: range, *, device: torch.device
) -> torch.Tensor:
    """The block's samples as uint8, drawn `batch_size` at a time."""
    drawn = [
        to_uint8(draw_batch(source, denoise, draw, indices=block[at : at + draw.batch_size], device=device))
        for at in range(0, len(block), draw.batch_size)
    ]
    return torch.cat(drawn)


def _write_result(
    request: Request,
    source: Source,
    bench: Bench,
    measured: list[dict[str, float]],
    *,
    out: Path,
    steps: int | None,
    seconds: float,
) -> None:
    reference = bench.reference
    assert reference is not None
    draw = SampleRequest(num=bench.settings.num_samples, steps=steps, batch_size=bench.settings.batch_size)
    data = dataset_of(source)
    mismatches = reference.mismatches(
        preprocess=None if data is None else data.preprocess, image_size=source.config.model.image_size
    )
    result = EvaluationResult(
        step=source.step,
        weights=source.weights_name,
        nfe=_nfe(source.config, steps),
        num_samples=bench.settings.num_samples,
        seeds=tuple(range(request.seeds)),
        features=bench.extractor.label,
        score_name=score_name(bench.extractor.label),
        reference=reference.describe(),
        seconds=round(seconds, 3),
        protocol={**_protocol(source, bench, draw), "cmscale": __version__, "torch": torch.__version__},
        warnings=(*mismatches, *left_out(reference, num_samples=bench.settings.num_samples)),
        **as_fields(measured),
    )
    storage, key = open_parent(out)
    storage.write(key, result.to_bytes())
    print(f"{step_name(source.step)} {source.weights_name}: {summary(result)}", flush=True)
    if source.run_dir is not None:
        write_event(RunDir(source.run_dir), "evaluated", step=source.step, rank=0, why=summary(result))


def evaluate_images(request: Request, world: World) -> Path:
    """Finished samples, anybody's: an `.npz` with `arr_0`, or a folder of images."""
    started = time.monotonic()
    images = open_images(request.source)
    bench = Bench.build(request, Evaluate(), world, data=None)
    reference = bench.reference
    assert reference is not None
    blocks = image_blocks(images.read(), bench.extractor)
    measured = measure(blocks, num_samples=images.count, reference=reference)
    mismatches = reference.mismatches(preprocess=None, image_size=images.height)
    result = EvaluationResult(
        num_samples=images.count,
        seeds=(0,),
        features=bench.extractor.label,
        score_name=score_name(bench.extractor.label),
        reference=reference.describe(),
        seconds=round(time.monotonic() - started, 3),
        protocol={"samples": images.name, "features_sha256": bench.extractor.weights_sha256},
        warnings=(*mismatches, *left_out(reference, num_samples=images.count)),
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


def _protocol(source: Source, bench: Bench, draw: SampleRequest) -> dict[str, Any]:
    """What decides the features of a sample, but for its seed."""
    return {
        "weights_sha256": source.fingerprint,
        "sampler": draw.sampler,
        "steps": draw.steps,
        "clip": draw.clip,
        "quantisation": "truncated to uint8",
        "features": bench.extractor.label,
        "features_sha256": bench.extractor.weights_sha256,
    }


def _result_path(request: Request, source: Source, *, nfe: int) -> Path:
    """Where the result goes: `--out`, or the run's evaluations folder."""
    if source.run_dir is not None and request.out is None:
        return RunDir(source.run_dir).evaluation(step=source.step, weights=source.weights_name, nfe=nfe)
    if request.out is None:
        raise UserError(f"{request.source}: not a run on this machine; say where the result goes with --out FILE.json")
    if len(request.checkpoint_list) * len(request.steps_list) > 1:
        raise UserError(f"--out {request.out}: one file can't hold several evaluations; give one step and one --steps")
    return Path(request.out)


def _work_dir(request: Request, source: Source) -> Path:
    """Where blocks are kept until they are measured; on Slurm all nodes must see it."""
    if request.work_dir is not None:
        return Path(request.work_dir)
    if source.run_dir is not None:
        return RunDir(source.run_dir).evaluations / ".blocks"
    return cache_folder() / "evaluations"


def _nfe(config: Config, steps: int | None) -> int:
    default = config.method.sampler_steps if config.method.kind == "edm" else 1
    return num_evaluations(config.method, steps or default)


def _numbers(text: str, *, flag: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{flag}: got {text!r}; write whole numbers, 1,2")
    return [int(part) for part in parts]


def _is_finished_samples(source: str) -> bool:
    """An `.npz`, or a folder that is neither run nor checkpoint nor exported model but holds images."""
    if source.endswith(".npz"):
        return True
    path = Path(source)
    known = ("config.yaml", "manifest.json", "model_index.json", "checkpoints")
    return path.is_dir() and not any((path / name).exists() for name in known)
