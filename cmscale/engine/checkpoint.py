"""Writes checkpoints: staged, hashed, the manifest last, and never by an older start than the run's newest."""

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cmscale.config import Config, trajectory
from cmscale.config.schedules import is_due
from cmscale.distributed.collectives import all_ranks, any_rank, from_main, gather, on_main
from cmscale.distributed.noticeboard import NoticeBoard
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine
from cmscale.engine.export import Exporter
from cmscale.errors import NoSpace, UserError
from cmscale.io.durable import NO_SPACE, explained, follow_umask, replace_durably, sync_file, sync_folder
from cmscale.io.fetch import file_sha256
from cmscale.runs.checkpoints import committed_steps, kept_steps, leftovers
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, rank_file, step_name
from cmscale.runs.generations import claim_next, read_generation
from cmscale.runs.log import write_event
from cmscale.runs.manifests import CheckpointManifest, FileEntry, RankPart, TrainState

LOOK_SECONDS = 10.0  # between two looks for a newer start
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks whether every rank has written its part


class CheckpointFailed(RuntimeError):
    """Raised if a checkpoint could not be written and training must stop for that."""


class Fenced(CheckpointFailed):
    """Raised if a newer start of the run exists: this one commits nothing more and ends."""


def claim_generation(run: RunDir) -> int:
    """Makes this start of the run its newest. Collective.

    From then on no older start commits; unfinished saves of older starts are removed.
    """

    def claim() -> int:
        generation = claim_next(run)
        for step, kind, leftover in leftovers(run):
            final = leftover.with_name(step_name(step))
            if kind == "replaced" and not final.exists():  # killed between the two renames of a commit
                with contextlib.suppress(FileNotFoundError):  # another start did the same
                    leftover.rename(final)
                continue
            if _writer(leftover.name) > generation:  # of a newer start that works already
                continue
            if kind == "save":
                why = f"{leftover.name}: an earlier start ended before this save was complete; removed"
                write_event(run, "unfinished_save", step=step, rank=0, why=why)
            remove(leftover)
        return generation

    return from_main(on_main(claim))


def _writer(leftover: str) -> int:
    """The start that made a hidden folder of checkpoints, such as `.step-000000020.start-1.save-2`; 0 if unknown."""
    found = re.search(r"\.(?:start|replaced|removed)-(\d+)", leftover)
    return int(found[1]) if found else 0


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
        self._generation = generation
        self._data_fingerprint = data_fingerprint
        self._exporter = exporter
        self._board = board or NoticeBoard()
        self._before_commit = before_commit
        self._thread: threading.Thread | None = None
        self._teacher_fingerprint = teacher_fingerprint
        self._saved = loaded
        self._failure: BaseException | None = None
        self._saves = 0
        self._looked = time.monotonic()

    def maybe_save(self, state: TrainState, engine: Engine) -> bool:
        """Saves if the step is a multiple of `checkpoint.every_steps`. Returns whether it did."""
        if state.step == 0 or state.step % self._config.checkpoint.every_steps:
            return False
        self.save(state, engine)
        return True

    def save(self, state: TrainState, engine: Engine) -> None:
        """Copies the state and starts to write it; does nothing if this very state was saved last. Collective.

        Raises:
            Fenced: on every rank, if a newer start of the run has taken over.
            CheckpointFailed: on every rank, if the previous save failed on any and `checkpoint.stop_on_failure` is
                set.
        """
        if state == self._saved:
            return
        self.wait()
        self.end_if_overtaken()
        if any_rank(self._config.checkpoint.stop_on_failure and self._failure is not None):
            raise self.failed("the previous checkpoint was not written") from self._failure
        shards = engine.shards
        tensors = {name: shards.local(name).detach().to("cpu", copy=True) for name in shards.quantities}
        manifest = CheckpointManifest(
            state=state,
            generation=self._generation,
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

    def _staged(self, final: Path, manifest: CheckpointManifest, tensors: dict[str, torch.Tensor]) -> "_Staged":
        hidden = final.with_name(f".{final.name}.start-{self._generation}.save-{self._saves}")
        return _Staged(hidden, final, manifest, tensors)

    def wait(self) -> None:
        """Waits until the last save is written (on rank 0: committed) or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> bool:
        """Waits for the last save. Returns whether it was committed; True if there was none. Collective."""
        self.wait()
        return all_ranks(self._failure is None)

    def overtaken(self) -> bool:
        """Whether this rank knows of a newer start of the run. Rank 0 looks for one every 10 seconds."""
        if self._world.is_main and time.monotonic() >= self._looked + LOOK_SECONDS:
            self._looked = time.monotonic()
            self._failure = self._newer_start() or self._failure
        return isinstance(self._failure, Fenced)

    def end_if_overtaken(self) -> None:
        """Ends this start if any rank knows of a newer one. Collective.

        Raises:
            Fenced: on every rank.
        """
        fenced = self._failure if isinstance(self._failure, Fenced) else None
        if any_rank(fenced is not None):
            raise fenced or Fenced("a newer start of the run has taken over")

    def failed(self, what: str) -> CheckpointFailed | UserError:
        """The error that stops training because the last save failed: `what`, and why. Collective.

        A full disk is for the user to mend; another start of the job would only meet it again.
        """
        reasons = gather("" if self._failure is None else str(self._failure))
        why = next(filter(None, reasons), "unknown")
        if NO_SPACE in why.lower():
            return NoSpace(f"{what}: {why}; then continue with --resume")
        return CheckpointFailed(f"{what}: {why}; see {self._run.events}")

    def _write(self, folders: "list[_Staged]") -> None:
        """Writes the folders and commits them in their order; the last is the checkpoint."""
        began, step = time.monotonic(), folders[-1].manifest.state.step
        try:
            for staged in folders:
                written = write_part(staged.folder, self._world, staged.tensors)
                record(self._board, staged.folder, self._world.rank, written)
            if self._world.is_main:
                parts = [self._await_parts(staged.folder) for staged in folders]
                self._before_commit()
                for staged, its_parts in zip(folders, parts, strict=True):
                    self._commit(staged, its_parts)
                seconds = round(time.monotonic() - began, 3)
                self._report("checkpoint", step, seconds=seconds)
                self._retain()
                if self._exporter is not None:
                    self._exporter.offer(step)
        except Exception as failure:
            error = self._newer_start() or failure  # which may have removed what this start had staged
            self._failure = error
            with contextlib.suppress(Exception):  # rank 0 may be gone
                for staged in folders:
                    why = f"rank {self._world.rank}: {type(error).__name__}: {error}"
                    self._board.fail(str(staged.folder), why)
            if self._world.is_main:
                for staged in folders:
                    shutil.rmtree(staged.folder, ignore_errors=True)  # first: its space may be what the event needs
                print(f"checkpoint of step {step} was not written: {error}", flush=True)
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
            self._must_be_newest()
            if time.monotonic() > deadline:
                missing = ", ".join(map(str, self._board.missing(topic, range(num_ranks))[:5]))
                raise TimeoutError(f"rank {missing} has not written its part of the checkpoint")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        files = map(FileEntry.model_validate_json, self._board.take(topic, num_ranks))
        return tuple(RankPart(file=file) for file in files)

    def _commit(self, staged: "_Staged", parts: tuple[RankPart, ...]) -> None:
        """Renames a staged folder to its final name; it replaces an earlier one of the same step."""
        write_manifest(staged.folder, staged.manifest.model_copy(update={"parts": parts}))
        final = staged.final
        replaced = final.with_name(f".{final.name}.replaced-{self._generation}")
        self._must_be_newest()
        if os.path.lexists(final):
            final.rename(replaced)
        staged.folder.rename(final)
        sync_folder(final.parent)
        remove(replaced)

    def _must_be_newest(self) -> None:
        newest = read_generation(self._run)
        if newest > self._generation:
            raise Fenced(f"start {newest} of the run has taken over from start {self._generation}; nothing committed")
        if newest < self._generation:  # a node that has lost the shared folder sees an empty one
            raise OSError(f"{self._run.root}: shows no start {self._generation}, which is this one; is it mounted?")

    def _newer_start(self) -> Fenced | None:
        """The error by which this start ends if there is a newer one; None also if storage does not tell."""
        if self._exporter is not None and self._exporter.went_elsewhere:
            return Fenced(self._exporter.went_elsewhere)
        try:
            self._must_be_newest()
        except Fenced as error:
            return error
        except (OSError, UserError):
            pass
        return None

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
            hidden = self._run.checkpoints / f".{step_name(step)}.removed-{self._generation}"
            self._run.checkpoint(step).rename(hidden)  # renamed first, so that nobody reads half of it
            remove(hidden)

    def _report(self, event: str, step: int, *, why: str = "", **more: Any) -> None:
        with contextlib.suppress(OSError, UserError):  # on a full disk the exception reports it
            write_event(
                self._run,
                event,
                step=step,
                rank=self._world.rank,
                why=why,
                generation=self._generation,
                **more,
            )


@dataclass(frozen=True)
class _Staged:
    """A folder that is being written under a hidden name: a checkpoint, or a snapshot of its averages."""

    folder: Path
    final: Path
    manifest: CheckpointManifest
    tensors: dict[str, torch.Tensor]


def write_part(staged: Path, world: World, tensors: dict[str, torch.Tensor]) -> FileEntry:
    """Writes a rank's file durably, with its name."""
    with explained(staged):
        staged.mkdir(parents=True, exist_ok=True)
        path = staged / rank_file(world.rank, world.num_ranks)
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise as_os_error(error) from error
        follow_umask(path)
        sync_file(path)
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))


def as_os_error(error: SafetensorError) -> Exception:
    """The error of the file system in an error of safetensors, which has it as text alone; else the error itself."""
    number = re.search(r"os error (\d+)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def remove(folder: Path) -> None:
    """Removes a checkpoint's folder; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def record(board: NoticeBoard, staged: Path, rank: int, file: FileEntry) -> None:
    """Tells rank 0 that a rank's part is written."""
    board.post(str(staged), rank, file.model_dump_json())


def write_manifest(staged: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest, which completes a staged checkpoint."""
    replace_durably(staged / CHECKPOINT_MANIFEST, manifest.to_bytes())
