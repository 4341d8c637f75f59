"""Trains a run: assembles its parts, then turns the loop until the last step or a preemption."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cmscale import pictures, preflight, schedules
from cmscale import world as worlds
from cmscale.assets import cache_folder, local_file, locked
from cmscale.bad_steps import BadSteps
from cmscale.config import CD, CT, ECT, PD, SCD, SCT, Config, read_config
from cmscale.consistency.distance import Distance, build_distance
from cmscale.consistency.loss import Loss, build_loss
from cmscale.consistency.networks import Networks
from cmscale.consistency.perceptual import download_vgg
from cmscale.consistency.progressive import ends_stage
from cmscale.consistency.sampler import sample
from cmscale.data import Batch, Batches, open_batches, to_device
from cmscale.engine.checkpoint import CheckpointFailed, Checkpoints, claim_generation
from cmscale.engine.engine import Engine, NonFiniteLoss, StepResult
from cmscale.engine.export import Exporter
from cmscale.engine.preemption import Preemption
from cmscale.engine.resume import newest, restore
from cmscale.engine.watchdog import Watchdog
from cmscale.errors import UserError
from cmscale.held_out import Probe
from cmscale.manifests import TrainState, read_dataset_manifest
from cmscale.metrics_log import write_event
from cmscale.model.choice import denoiser_for
from cmscale.model.denoiser import EDMDenoiser
from cmscale.model.trigflow import TrigFlow
from cmscale.model.unet import build_unet
from cmscale.model.weighting import build_weighted_unet
from cmscale.rng import SampleRandomness
from cmscale.run_log import RunLog
from cmscale.rundir import RunDir
from cmscale.source import load_teacher, weights_fingerprint
from cmscale.storage import open_storage
from cmscale.stragglers import Stragglers
from cmscale.world import World


def main(run_dir: str, fresh: bool = False) -> str:
    """Trains, or goes on training, the run in `run_dir`; a rank of a job calls it.

    Args:
        fresh: Start anew although no checkpoint of the run can be loaded.

    Returns:
        `finished`, or `preempted` with a checkpoint of the last applied step.

    Raises:
        UserError: what the run was told can't be done.
    """
    run = RunDir(Path(run_dir))
    config = read_config(run.config)
    preemption = Preemption.install()
    world = worlds.detect(config.engine.device)
    worlds.connect(world, timeout_minutes=config.engine.collective_timeout_minutes)
    try:
        preflight.check(config, run, world)
        return train(config, run, world, preemption=preemption, fresh=fresh)
    except Exception as error:
        with contextlib.suppress(OSError, UserError):  # a full disk must not hide what happened
            write_event(run, "fault", step=-1, rank=world.rank, why=f"{type(error).__name__}: {error}")
        raise
    finally:
        worlds.disconnect()


def train(config: Config, run: RunDir, world: World, *, preemption: Preemption, fresh: bool = False) -> str:
    """The run, from its newest checkpoint (or the start) to its end. Collective."""
    data = read_dataset_manifest(open_storage(config.data.path)).fingerprint
    generation = claim_generation(run)
    found = newest(run, config, world, data_fingerprint=data, fresh=fresh)
    parts = assemble(config, world, fresh=found is None)
    engine, shards = parts.engine, parts.engine.shards
    state = TrainState() if found is None else restore(found, engine)
    teacher = parts.teacher_fingerprint
    if found is not None:
        teacher = must_be_its_teacher(config, found.manifest.teacher_fingerprint, teacher)
    batches = open_data(config, world, state)  # before any thread: its workers are forked
    exporter = Exporter(run, config.checkpoint.export_to) if config.checkpoint.export_to and world.is_main else None
    checkpoints = Checkpoints(
        run,
        config,
        world,
        generation=generation,
        data_fingerprint=data,
        teacher_fingerprint=teacher,
        exporter=exporter,
        loaded=None if found is None else state,
    )
    log = RunLog(config, run, world, batches=batches)
    probe = Probe(config, world)
    watchdog = Watchdog(run, config, world)
    bad_steps = BadSteps(config, run, world)
    stragglers = Stragglers(run, world, every=config.train.log_every)
    log.started(state)
    if found is None:  # no step before there is something to go back to
        checkpoints.save(state, engine)
        if not checkpoints.close():
            raise CheckpointFailed(f"the first checkpoint could not be written; see {run.events}")

    while state.step < config.train.total_steps and not preemption.requested():
        stragglers.begin()
        point = schedules.at(config, state.step)
        batch, cursor = next(batches)
        result = parts.step(batch, point)
        if result.applied:
            shards.update(point)
            if ends_stage(config.method, point):
                engine.start_over()
        state = state.advance(cursor, result.applied)
        if result.applied:
            stragglers.stepped(state.step, ready=engine.clock.started, forward=engine.clock.seconds())
        error = probe.after(state.step, engine, parts.networks.teacher) if result.applied else None
        log.stepped(state, point, result, consistency_error=error)
        if bad_steps.is_lost(result, batch, state):  # back to the newest checkpoint, and past the data that led here
            checkpoints.wait()
            found = newest(run, config, world, data_fingerprint=data)
            assert found is not None, "the first checkpoint is written before the first step"
            state = TrainState(step=restore(found, engine).step, cursor=cursor)
        if result.applied and schedules.is_due(state.step, config.train.sample_every, config.train.total_steps):
            save_sample_grid(config, run, world, engine, step=state.step)
        checkpoints.maybe_save(state, engine)
        watchdog.beat(state.step)

    finished = state.step >= config.train.total_steps
    checkpoints.save(state, engine)
    saved = checkpoints.close()
    if exporter is not None:  # a preempted job has seconds; the next start copies what is left
        exporter.close(patience=60.0 * config.engine.collective_timeout_minutes if finished else 5.0)
    watchdog.stop()
    batches.close()
    log.ended(state, "finished" if finished else "preempted", why="" if finished else preemption.why)
    engine.close()
    if not saved:
        raise CheckpointFailed(f"step {state.step}: the last checkpoint could not be written; see {run.events}")
    return "finished" if finished else "preempted"


@dataclass(frozen=True)
class Parts:
    """What a step needs: the engine, the method's loss, and the networks as denoisers."""

    config: Config
    world: World
    engine: Engine
    loss: Loss
    networks: Networks
    teacher_fingerprint: str | None

    def step(self, batch: Batch, point: schedules.Point) -> StepResult:
        """One step on one global batch; not applied where the loss is not finite."""
        try:
            return self.engine.step(self.micro_losses(batch, point), point.learning_rate)
        except NonFiniteLoss:
            return StepResult(applied=False, loss=math.nan, grad_norm=math.inf, loss_scale=1.0)

    def micro_losses(self, batch: Batch, point: schedules.Point) -> Iterator[Callable[[], torch.Tensor]]:
        """For each micro-batch, what computes its mean loss."""
        images = to_device(batch, self.world.device)
        size = self.config.train.micro_batch_size
        random = SampleRandomness(self.config.train.seed, batch.positions, self.world.device)
        for clean, numbers in zip(images.split(size), random.split(size), strict=True):
            yield lambda clean=clean, numbers=numbers: self.loss(self.networks, clean, point, numbers).mean()


def assemble(config: Config, world: World, *, fresh: bool) -> Parts:
    """Networks, engine and loss of a method; a fresh student starts from the teacher's weights where it has one.

    Raises:
        UserError: a class-conditional network, which can be sampled and evaluated, but not trained here.
    """
    method = config.method
    if config.model.num_classes is not None:
        raise UserError("model.num_classes: data sets carry no classes, so conditional networks can't be trained here")
    distilled = isinstance(method, CD | SCD)
    starts = isinstance(method, CD | ECT | PD | SCD) or (isinstance(method, SCT) and method.start == "teacher")
    teacher = load_teacher(config) if distilled or (starts and fresh) else None
    build_network = partial(
        build_weighted_unet if isinstance(method, SCT | SCD) else build_unet, config.model, seed=config.train.seed
    )
    start = None
    if fresh and teacher is not None:
        start = {**build_network().state_dict(), **teacher}  # sCM's weighting is no teacher's
    engine = Engine(config, world, build_network, start, has_target=isinstance(method, CD | CT | PD))
    networks = Networks(
        student=denoiser_for(method, engine.network),
        target=None if engine.target is None else denoiser_for(method, engine.target),
        teacher=build_teacher(config, engine, teacher) if distilled and teacher is not None else None,
    )
    loss = build_loss(method, load_distance(config, world))
    return Parts(config, world, engine, loss, networks, None if teacher is None else weights_fingerprint(teacher))


def must_be_its_teacher(config: Config, trained_with: str | None, now: str | None) -> str | None:
    """The fingerprint of the run's teacher: a distillation goes on with the one it began with.

    Raises:
        UserError: another teacher, for example a run that was trained on since.
    """
    if now is not None and trained_with is not None and now != trained_with:
        teacher = getattr(config.method, "teacher", None)
        raise UserError(
            f"method.teacher: {teacher} holds other weights (fingerprint {now[:12]}) than this run began with "
            f"({trained_with[:12]}); name the checkpoint that it was, or start a new run"
        )
    return trained_with or now


def build_teacher(config: Config, engine: Engine, weights: dict[str, torch.Tensor]) -> EDMDenoiser | TrigFlow:
    """The frozen diffusion model that a distillation follows; sCD sees it in TrigFlow's terms."""
    raw = engine.add_frozen("teacher", weights, partial(build_unet, config.model))
    if isinstance(config.method, SCD):
        return TrigFlow(raw, sigma_data=config.method.sigma_data, time="log_sigma")
    return EDMDenoiser(raw, sigma_data=config.method.sigma_data)


def load_distance(config: Config, world: World) -> Distance:
    """The distance of the loss; LPIPS' VGG from where the config says, else from its home, one process a node."""
    method = config.method
    weights = None
    if isinstance(method, CD | CT | PD) and method.distance == "lpips":
        if method.lpips_weights is not None:
            weights = local_file(method.lpips_weights)
        else:
            with locked(cache_folder() / "vgg.lock"):
                weights = download_vgg()
    return build_distance(method, config.model.image_size, lpips_weights=weights, device=world.device)


def open_data(config: Config, world: World, state: TrainState) -> Batches:
    """The batches from where training stands."""
    return open_batches(
        config.data,
        world,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        image_size=config.model.image_size,
        start_cursor=state.cursor,
    )


def save_sample_grid(config: Config, run: RunDir, world: World, engine: Engine, *, step: int) -> None:
    """A grid of fixed seeds' samples under the first EMA, drawn by all ranks. Collective."""
    size, count = config.model.image_size, config.train.sample_count
    share = -(-count // world.num_ranks)
    steps = schedules.at(config, step - 1).num_scales if isinstance(config.method, PD) else None  # as now trained
    indices = range(world.rank * share, (world.rank + 1) * share)  # all ranks evaluate as often: ZeRO-3 needs it
    size_of_pass = config.train.micro_batch_size  # what is known to fit beside the training state
    with engine.showing(config.ema.names[0]) as network:
        denoise = denoiser_for(config.method, network)
        draw = partial(sample, config.method, denoise, seed=0, steps=steps, shape=(3, size, size), device=world.device)
        images = [draw(indices=indices[at : at + size_of_pass]) for at in range(0, share, size_of_pass)]
    drawn = torch.cat(worlds.gather(torch.cat(images).cpu()))[:count]
    if world.is_main and bool(torch.isfinite(drawn).all()):
        pictures.save_png(pictures.grid(pictures.to_uint8(drawn)), run.sample_grid(step))
