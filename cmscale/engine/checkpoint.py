"""Writes checkpoints: staged, hashed, the manifest last, and never by an older start than the run's newest."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cmscale.config import Config, trajectory
from cmscale.config.schedules import is_due
from cmscale.distributed.collectives import all_ranks, any_rank, gather
from cmscale.distributed.noticeboard import NoticeBoard
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine
from cmscale.engine.export import Exporter
from cmscale.engine.fence import CheckpointFailed, Fence, FolderGone
from cmscale.engine.staged import Staged, record, remove, write_part
from cmscale.errors import NoSpace, UserError
from cmscale.io.durable import NO_SPACE
from cmscale.io.remarks import say
from cmscale.runs.checkpoints import committed_steps, kept_steps
from cmscale.runs.folder import RunDir, step_name
from cmscale.runs.log import write_event
from cmscale.runs.manifests import CheckpointManifest, FileEntry, RankPart, TrainState

MOST_TIMES_GONE = 2
"""A shared folder may be away for a moment; one that was moved or removed stays away."""

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks whether every rank has written its part


class Checkpoints:
    """Saves checkpoints during one start of a run. Every rank makes the same calls.

    `save` copies the state to host memory and returns; a thread writes it. A save waits for the one before and agrees
    across ranks on one flag; it communicates nothing else. Rank 0's thread commits once every rank has recorded its
    part.

    Args:
        generation: from `claim_generation`.
        exporter: gets the step of every committed checkpoint, on rank 0.
        board: tells rank 0 what the ranks have written; by default that of the process group.
        before_commit: called on rank 0 before each commit: makes durable what belongs to the checkpoint.
        loaded: the state that this start read from a checkpoint, which need not be saved again.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        world: World,
        *,
        generation: int,
        data_fingerprint: str,
        teacher_fingerprint: str | None = None,
        exporter: Exporter | None = None,
        board: NoticeBoard | None = None,
        before_commit: Callable[[], None] = lambda: None,
        loaded: TrainState | None = None,
    ) -> None:
        self._run = run
        self._config = config
        self._world = world
        self._data_fingerprint = data_fingerprint
        self._exporter = exporter
        self._board = board or NoticeBoard()
        self._before_commit = before_commit
        self._thread: threading.Thread | None = None
        self._teacher_fingerprint = teacher_fingerprint
        self._saved = loaded
        self._failure: BaseException | None = None
        self._saves = 0
        self._times_gone = 0  # how many saves in a row did not find the run's folder
        self._fence = Fence(run, world, generation, lambda: "" if exporter is None else exporter.went_elsewhere)

    def went_back(self, state: TrainState) -> None:
        """Notes that training is at the state of a checkpoint again: the steps after it are made and saved anew."""
        self._saved = state

    def maybe_save(self, state: TrainState, engine: Engine) -> bool:
        """Saves if the step is a multiple of `checkpoint.every_steps`. Returns whether it did."""
        if state.step == 0 or state.step % self._config.checkpoint.every_steps:
            return False
        self.save(state, engine)
        return True

    def save(self, state: TrainState, engine: Engine) -> None:
        """Copies the state and starts to write it; does nothing if this step was saved last. Collective.

        Steps that were not applied since have changed no weights, and a resume makes them again. A second checkpoint of
        the step would differ from the copy of the first, which stays.

        Raises:
            Fenced: on every rank, if a newer start of the run has taken over.
            CheckpointFailed: on every rank, if the previous save failed on any and `checkpoint.stop_on_failure` is
                set, or if two saves in a row did not find the run's folder: no later one would.
        """
        if self._saved is not None and state.step == self._saved.step:
            return
        self.wait()
        self.end_if_overtaken()
        must_stop = self._config.checkpoint.stop_on_failure and self._failure is not None
        if any_rank(must_stop or self._times_gone >= MOST_TIMES_GONE):
            raise self.failed("the previous checkpoint was not written") from self._failure
        shards = engine.shards
        tensors = {name: shards.local(name).detach().to("cpu", copy=True) for name in shards.quantities}
        manifest = CheckpointManifest(
            state=state,
            generation=self._fence.generation,
            num_ranks=self._world.num_ranks,
            zero_stage=self._config.engine.zero_stage,
            config_fingerprint=self._config.fingerprint(),
            config=self._config.model_dump(mode="json"),
            trajectory=trajectory(self._config),
            data_fingerprint=self._data_fingerprint,
            teacher_fingerprint=self._teacher_fingerprint,
            quantities=shards.quantities,
            parameters=shards.parameters,
            num_elements=shards.num_elements,
            part_size=shards.partition.part_size,
            parts=(),
            scalars=engine.scalars(),
        )
        self._saved, self._failure = state, None
        self._saves += 1  # names the folder, so that no record of a failed save counts for this one
        folders = [self._staged(self._run.checkpoint(state.step), manifest, tensors)]
        if state.step and is_due(state.step, self._config.ema.snapshot_every, self._config.train.total_steps):
            averages = shards.power_averages
            held = manifest.model_copy(update={"quantities": averages, "scalars": {}})
            kept = {name: tensors[name] for name in averages}
            folders.insert(0, self._staged(self._run.snapshot(state.step), held, kept))  # a checkpoint means it exists
        self._thread = threading.Thread(target=self._write, args=(folders,), name=f"save-{state.step}")
        self._thread.start()

    def _staged(self, final: Path, manifest: CheckpointManifest, tensors: dict[str, torch.Tensor]) -> Staged:
        hidden = final.with_name(f".{final.name}.start-{self._fence.generation}.save-{self._saves}")
        return Staged(hidden, final, manifest, tensors)

    def wait(self) -> None:
        """Waits until the last save is written (on rank 0: committed) or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> bool:
        """Waits for the last save. Returns whether it was committed; True if there was none. Collective."""
        self.wait()
        return all_ranks(self._failure is None and self._fence.known is None)

    def overtaken(self) -> bool:
        """Whether this rank knows of a newer start of the run. Rank 0 looks for one every 10 seconds."""
        return self._fence.overtaken()

    def end_if_overtaken(self) -> None:
        """Ends this start if any rank knows of a newer one. Collective.

        Raises:
            Fenced: on every rank.
        """
        self._fence.end_if_overtaken()

    def failed(self, what: str) -> CheckpointFailed | UserError:
        """The error that stops training because the last save failed: `what`, and why. Collective.

        A full disk is for the user to mend; another start of the job would only meet it again.
        """
        reasons = gather("" if self._failure is None else str(self._failure))
        why = next(filter(None, reasons), "unknown")
        if NO_SPACE in why.lower():
            return NoSpace(f"{what}: {why}; then continue with --resume")
        return CheckpointFailed(f"{what}: {why}; see {self._run.events}")

    def _write(self, folders: list[Staged]) -> None:
        """Writes the folders and commits them in their order; the last is the checkpoint."""
        began, step = time.monotonic(), folders[-1].manifest.state.step
        try:
            if not self._run.root.is_dir():  # it is not made anew
                self._fence.must_be_newest()
            for staged in folders:
                written = write_part(staged.folder, self._world, staged.tensors)
                record(self._board, staged.folder, self._world.rank, written)
            if self._world.is_main:
                parts = [self._await_parts(staged.folder) for staged in folders]
                self._before_commit()
                for staged, its_parts in zip(folders, parts, strict=True):
                    staged.commit(its_parts, fence=self._fence.must_be_newest)
                seconds = round(time.monotonic() - began, 3)
                self._report("checkpoint", step, seconds=seconds)
                if self._exporter is not None:
                    self._exporter.offer(step)
                self._retain()
            self._times_gone = 0
        except Exception as failure:
            error = self._fence.look() or failure  # which may have removed what this start had staged
            self._failure = error
            is_gone = isinstance(error, FolderGone) or self._fence.is_gone()  # else it may be what another rank saw
            self._times_gone = self._times_gone + 1 if is_gone else 0
            with contextlib.suppress(Exception):  # rank 0 may be gone
                for staged in folders:
                    why = f"rank {self._world.rank}: {type(error).__name__}: {error}"
                    self._board.fail(str(staged.folder), why)
            if self._world.is_main:
                for staged in folders:
                    shutil.rmtree(staged.folder, ignore_errors=True)  # first: its space may be what the event needs
                say(f"checkpoint of step {step} was not written: {error}")
            self._report("checkpoint_failed", step, why=f"{type(error).__name__}: {error}")

    def _await_parts(self, staged: Path) -> tuple[RankPart, ...]:
        """Every rank's part, by rank.

        Raises:
            RuntimeError: a rank recorded an error.
            TimeoutError: a rank recorded nothing within the collectives' time-out.
        """
        topic, num_ranks, pause = str(staged), self._world.num_ranks, FIRST_PAUSE
        deadline = time.monotonic() + 60.0 * self._config.engine.collective_timeout_minutes
        while self._board.count(topic) < num_ranks:
            if (why := self._board.failure(topic)) is not None:
                raise RuntimeError(why)
            self._fence.must_be_newest()
            if time.monotonic() > deadline:
                missing = ", ".join(map(str, self._board.missing(topic, range(num_ranks))[:5]))
                raise TimeoutError(f"rank {missing} has not written its part of the checkpoint")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        files = map(FileEntry.model_validate_json, self._board.take(topic, num_ranks))
        return tuple(RankPart(file=file) for file in files)

    def _retain(self) -> None:
        """Removes old checkpoints.

        It keeps the last `keep_last`, multiples of `keep_every` (but not step 0, which is untrained), and those that
        wait for their upload, unless storage has been away for so long that `2 keep_last` newer ones exist: then a full
        disk is the greater risk.
        """
        kept = self._config.checkpoint
        steps = committed_steps(self._run)
        waiting = self._exporter.waiting() if self._exporter is not None else set()
        patient = steps[-2 * kept.keep_last :]
        staying = kept_steps(steps, last=kept.keep_last, every=kept.keep_every)
        for step in steps:
            if step in staying or (step in waiting and step in patient):
                continue
            hidden = self._run.checkpoints / f".{step_name(step)}.removed-{self._fence.generation}"
            try:
                self._run.checkpoint(step).rename(hidden)  # renamed first, so that nobody reads half of it
            except OSError as error:  # the new checkpoint is there, and the next save tries again
                say(f"{self._run.checkpoint(step)}: is not removed ({error.strerror})")
                continue
            remove(hidden)

    def _report(self, event: str, step: int, *, why: str = "", **more: Any) -> None:
        with contextlib.suppress(OSError, UserError):  # on a full disk the exception reports it
            write_event(
                self._run,
                event,
                step=step,
                rank=self._world.rank,
                why=why,
                generation=self._fence.generation,
                **more,
            )
