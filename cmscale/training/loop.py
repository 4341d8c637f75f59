"""Runs the training loop of a run from its newest checkpoint until the last step or a preemption."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from cmscale.config import Config, read_config, schedules
from cmscale.data import Batches, open_samples
from cmscale.data.workers import with_advice
from cmscale.distributed import world as worlds
from cmscale.distributed.collectives import together
from cmscale.distributed.world import World
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.engine import Engine
from cmscale.engine.export import Exporter
from cmscale.engine.fence import Fenced, claim_generation
from cmscale.engine.preemption import Preemption
from cmscale.engine.resume import newest, restore
from cmscale.engine.watchdog import Watchdog
from cmscale.errors import NotExported, UserError
from cmscale.io.packages import require
from cmscale.runs.folder import RunDir
from cmscale.runs.log import write_event
from cmscale.runs.manifests import TrainState
from cmscale.training import preflight
from cmscale.training.assemble import Parts, assemble, check_same_teacher, flat_space, open_data
from cmscale.training.bad_steps import BadSteps
from cmscale.training.consistency_probe import Probe
from cmscale.training.feed import Feed
from cmscale.training.profiling import Profiler
from cmscale.training.run_log import RunLog
from cmscale.training.sample_grid import Grids
from cmscale.training.stragglers import Stragglers
from cmscale.training.usage import Usage


def main(run_dir: str, fresh: bool = False) -> str:
    """Trains the run in `run_dir`, from its newest checkpoint if it has one. Called on every rank of a job.

    Args:
        fresh: Start from step 0 if no checkpoint of the run can be loaded.

    Returns:
        `finished`; `preempted`, with a checkpoint of the last applied step; or `superseded` by a newer start of the
        run, after which this one commits nothing more.

    Raises:
        UserError: the config can't be carried out here, or no space is left for a checkpoint.
        NotExported: on rank 0, if training has finished and checkpoints are not where `checkpoint.export_to` says.
    """
    run = RunDir(Path(run_dir))
    config = read_config(run.config, resolved=True)
    config.storage.apply()
    if config.tensorboard.enabled:
        require("tensorboard", key="tensorboard.enabled")
    preemption = Preemption.install()
    world = worlds.detect(config.engine.device, option="engine.device=")
    try:
        worlds.connect(world, timeout_minutes=config.engine.collective_timeout_minutes)
        preflight.check(config, run, world)
        return train(config, run, world, preemption=preemption, fresh=fresh)
    except Fenced as error:
        if world.is_main:
            with contextlib.suppress(OSError, UserError):
                write_event(run, "superseded", step=-1, rank=0, why=str(error))
        return "superseded"
    except NotExported:
        raise
    except Exception as error:
        advised = with_advice(error)
        with contextlib.suppress(OSError, UserError):  # a full disk must not hide the error
            write_event(run, "fault", step=-1, rank=world.rank, why=f"{type(advised).__name__}: {advised}")
        if advised is error:
            raise
        raise advised from error
    finally:
        worlds.disconnect()


def train(config: Config, run: RunDir, world: World, *, preemption: Preemption, fresh: bool = False) -> str:
    """Trains a run from its newest checkpoint, or from step 0 if it has none. Collective."""
    begun = _begin(config, run, world, preemption=preemption, fresh=fresh)
    parts, checkpoints, log, state = begun.parts, begun.checkpoints, begun.log, begun.state
    engine, shards = parts.engine, parts.engine.shards
    probe = Probe(config, world)
    watchdog = Watchdog(run, config, world)
    bad_steps = BadSteps(config, run, world)
    stragglers = Stragglers(run, world, every=config.train.log_every)
    profiler = Profiler(config, run, world)
    grids = Grids(config, run, world, engine)
    log.started(state, attention=parts.attention)
    if begun.is_new:
        _save_the_first(checkpoints, state, engine)
    grids.begin(fresh=begun.is_new)

    feed = Feed(begun.batches, run, world, preemption=preemption, watchdog=watchdog)
    while state.step < config.train.total_steps:
        stragglers.begin()
        profiler.begin(state.step + 1)
        fed = feed.next(state.step)
        if fed is None:
            break
        batch, cursor = fed
        values = schedules.at(config, state.step)
        result = parts.step(batch, values)
        if result.applied:
            shards.update(values)
            if values.ends_stage:
                engine.start_over()
        state = state.advance(cursor, result.applied)
        profiler.end(state.step)
        if result.applied:
            ready = engine.clock.started - feed.shared_seconds
            stragglers.stepped(state.step, ready=ready, forward=engine.clock.seconds())
        error = probe.after(state.step, engine, parts.networks.teacher) if result.applied else None
        measured = parts.measurements.means() if result.applied else {}
        log.stepped(state, values, result, measured=measured, consistency_error=error)
        if bad_steps.must_roll_back(result, batch, state):  # to the newest checkpoint, without repeating the data since
            checkpoints.wait()
            found = newest(run, config, world, data_fingerprint=begun.data_fingerprint)
            assert found is not None, "the first checkpoint is written before the first step"
            state = restore(found, engine)
            checkpoints.went_back(state)
            state = state.advance(cursor, stepped=False)
        if result.applied:
            grids.after(state.step, batch)
            checkpoints.maybe_save(state, engine)
        if checkpoints.overtaken():
            preemption.ask("a newer start of the run")
        watchdog.beat(state.step)

    profiler.close()
    return _end(begun, state, watchdog=watchdog, preemption=preemption)


@dataclass(frozen=True)
class _Begun:
    """A run that is ready for its next step.

    Attributes:
        is_new: Whether it has no checkpoint yet.
        exporter: On rank 0, what copies checkpoints to `checkpoint.export_to`.
    """

    config: Config
    run: RunDir
    data_fingerprint: str
    is_new: bool
    state: TrainState
    parts: Parts
    batches: Batches
    log: RunLog
    exporter: Exporter | None
    checkpoints: Checkpoints


def _begin(config: Config, run: RunDir, world: World, *, preemption: Preemption, fresh: bool) -> _Begun:
    """Assembles a run, and restores its newest checkpoint if it has one. Collective."""
    samples = together(lambda: open_samples(config.data))
    data = samples.manifest.fingerprint
    generation = claim_generation(run)
    found = newest(run, config, world, data_fingerprint=data, parameters=flat_space(config), fresh=fresh)
    parts = assemble(config, world, fresh=found is None)
    state = TrainState() if found is None else restore(found, parts.engine)
    teacher = parts.teacher_fingerprint
    if found is not None:
        teacher = check_same_teacher(config, found.manifest.teacher_fingerprint, teacher)
    batches = open_data(config, world, state, samples)  # before any thread is started, as its workers are forked
    usage = Usage(config, world)
    log = RunLog(config, run, world, batches=batches, usage=usage, leaving=lambda: preemption.flagged)
    exporter = None
    if config.checkpoint.export_to and world.is_main:
        exporter = Exporter(run, config.checkpoint.export_to, settings=config.checkpoint)
    checkpoints = Checkpoints(
        run,
        config,
        world,
        generation=generation,
        data_fingerprint=data,
        teacher_fingerprint=teacher,
        exporter=exporter,
        before_commit=log.sync,
        loaded=None if found is None else state,
    )
    return _Begun(config, run, data, found is None, state, parts, batches, log, exporter, checkpoints)


def _save_the_first(checkpoints: Checkpoints, state: TrainState, engine: Engine) -> None:
    """Writes the checkpoint of step 0, which a rollback needs."""
    checkpoints.save(state, engine)
    saved = checkpoints.close()
    checkpoints.end_if_overtaken()
    if not saved:
        raise checkpoints.failed("the first checkpoint was not written")


def _end(begun: _Begun, state: TrainState, *, watchdog: Watchdog, preemption: Preemption) -> str:
    """Saves the last checkpoint, waits for its copies, and says how the run ended. Collective."""
    config, run, checkpoints, exporter = begun.config, begun.run, begun.checkpoints, begun.exporter
    engine = begun.parts.engine
    finished = state.step >= config.train.total_steps
    checkpoints.save(state, engine)
    saved = checkpoints.close()
    checkpoints.end_if_overtaken()
    watchdog.stop()  # copies may take longer than any step
    begun.batches.close()
    missing = ""
    if exporter is not None and finished and saved:
        missing = exporter.finish(patience=60.0 * config.storage.patience_minutes)
    elif exporter is not None:
        exporter.close(patience=5.0)  # a preempted job has seconds; the next start uploads the rest
    if not saved:
        raise checkpoints.failed(f"the last checkpoint, of step {state.step}, was not written")
    begun.log.ended(state, "finished" if finished else "preempted", why="" if finished else preemption.why)
    engine.close()
    if missing:
        write_event(run, "not_exported", step=state.step, rank=0, why=missing)
        raise NotExported(f"{missing}; when that is mended, --resume copies the rest")
    return "finished" if finished else "preempted"
