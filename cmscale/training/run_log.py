"""Logs a training run: metrics, events, and a line per logged step from which launchers draw a progress bar."""

import time
from collections.abc import Callable, Mapping

from cmscale.config import Config, schedules
from cmscale.config.cautions import cautions
from cmscale.config.schedules import ScheduleValues
from cmscale.data import Batches
from cmscale.data.batches import worker_cautions
from cmscale.distributed.world import World
from cmscale.engine.engine import StepResult
from cmscale.engine.settings import precision_cautions
from cmscale.io.counting import in_words
from cmscale.io.remarks import dispensable, say
from cmscale.model.attention_choice import Choice
from cmscale.runs.folder import RunDir
from cmscale.runs.lineage import read_lineage
from cmscale.runs.log import measured_until, write_event
from cmscale.runs.manifests import TrainState
from cmscale.runs.starts import add_to_newest_start
from cmscale.training.metrics_log import MetricsLog
from cmscale.training.usage import Usage


class RunLog:
    """Rank 0 logs metrics and events; the other ranks log only samples and shards that they had to replace.

    Args:
        leaving: Whether this rank was asked to stop.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        world: World,
        *,
        batches: Batches,
        usage: Usage,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._run = run
        self._world = world
        self._batches = batches
        self._usage = usage
        self._metrics = MetricsLog(
            run,
            config.wandb,
            config=config.model_dump(mode="json"),
            active=world.is_main,
            tensorboard=config.tensorboard,
            prometheus=config.prometheus,
            leaving=leaving,
        )
        self._since = time.perf_counter()
        self._cursor = 0
        self._has_logged = False
        self._replaced: set[str] = set()

    def started(self, state: TrainState, *, attention: Choice) -> None:
        """Logs that training starts or resumes at `state`, and with which attention."""
        self._cursor = state.cursor
        # Of a start that was killed no event says how long it trained after its last one.
        until = measured_until(self._run) if self._world.is_main else None
        of_node = (*precision_cautions(self._config, self._world.device), *worker_cautions(self._config.data.workers))
        for caution in (*cautions(self._config), *of_node):
            self._event("caution", state, why=caution)
        origin = self._config.train.init_from
        why = f"first weights from {origin}" if origin and not state.step else ""
        lineage = read_lineage(self._run) if self._world.is_main else None
        if lineage is not None and lineage.step == state.step:
            why = f"branch of {lineage}"
        more = {} if until is None else {"measured_until": until}
        event, ranks = "resumed" if state.step else "start", self._world.num_ranks
        self._event(event, state, why=why, attention=str(attention), ranks=ranks, **more)
        if self._world.is_main:
            with dispensable(f"the attention in {self._run.provenance.name}"):
                add_to_newest_start(self._run, attention=str(attention))

    def stepped(
        self,
        state: TrainState,
        values: ScheduleValues,
        result: StepResult,
        *,
        measured: Mapping[str, float | None],
        consistency_error: float | None = None,
    ) -> None:
        """Logs every `train.log_every` steps, the first and last step, and every step that was not applied.

        Steps with a consistency error are logged too.

        Args:
            measured: Means of what the step measured per image; those of the loss itself are already in `result`.
        """
        self._log_replaced(state)
        if not result.applied:
            self._event("step_not_applied", state, why=f"loss {result.loss:g}, loss scale {result.loss_scale:g}")
            return
        due = schedules.is_logged(self._config.train, state.step)
        if not due and consistency_error is None:
            return
        now = time.perf_counter()
        seconds, images = now - self._since, state.cursor - self._cursor
        self._since, self._cursor = now, state.cursor
        speed = images / seconds
        more = {name: value for name, value in measured.items() if name != "loss"}
        if consistency_error is not None:
            more["consistency_error"] = consistency_error
        self._metrics.write(
            {
                "step": state.step,
                "samples": state.cursor,
                "loss": result.loss,
                "lr": values.learning_rate,
                "num_scales": values.num_scales,
                "target_ema": values.target_ema,
                "grad_norm": result.grad_norm,
                "loss_scale": result.loss_scale,
                "seconds": round(seconds, 4),
                "images_per_second": round(speed, 3),
                **self._usage.of(speed),
                **more,
            }
        )
        if self._world.is_main:
            total = self._config.train.total_steps
            line = f"step {state.step}/{total}  loss {result.loss:.5g}"
            if self._has_logged or images > self._config.train.global_batch_size:  # a start's first step takes long
                left = in_words((total - state.step) * self._config.train.global_batch_size / speed)
                line += f"  {speed:.1f} images/s  {left} left"
            say(line)
        self._has_logged = True

    def sync(self) -> None:
        """Makes all metrics so far durable. Raises OSError or UserError if they can't be written."""
        self._metrics.sync()

    def ended(self, state: TrainState, event: str, *, why: str) -> None:
        """Logs how training ended, and closes the log."""
        self._log_replaced(state)
        self._event(event, state, why=why)
        self._metrics.close()

    def _log_replaced(self, state: TrainState) -> None:
        """Logs each undecodable sample and each bad shard of this rank once."""
        for event, found in (("bad_sample", self._batches.bad), ("bad_shard", self._batches.bad_shards)):
            for name in found.keys() - self._replaced:
                self._replaced.add(name)
                with dispensable(f"{event} at step {state.step}"):
                    write_event(self._run, event, step=state.step, rank=self._world.rank, why=f"{name}: {found[name]}")

    def _event(self, event: str, state: TrainState, *, why: str = "", **more: object) -> None:
        if not self._world.is_main:
            return
        with dispensable(f"{event} at step {state.step}"):
            write_event(self._run, event, step=state.step, rank=0, why=why, **more)
