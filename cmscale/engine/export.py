"""Copies what a run saves to `checkpoint.export_to` while it trains, and removes old copies there."""

import contextlib
import threading
import time
from pathlib import Path

from cmscale.config.sections import Checkpoint
from cmscale.engine.checkpoint_reader import read_manifest
from cmscale.engine.copying import (
    DamagedHere,
    DamagedUpload,
    copy_manifest,
    export_checkpoint,
    remove_copy,
)
from cmscale.engine.pending_export import named
from cmscale.errors import UserError
from cmscale.io.durable import NO_SPACE
from cmscale.io.local import LocalStorage
from cmscale.io.patience import is_waiting
from cmscale.io.remarks import say
from cmscale.io.storage import Storage
from cmscale.runs.checkpoint_copy import same_contents
from cmscale.runs.copies import Copied, committed, exported_run, wanted_copies
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir
from cmscale.runs.history import HistoryCopy
from cmscale.runs.homes import WentElsewhere, must_be_home, token_of
from cmscale.runs.log import write_event

CLOSING_RETRY_SECONDS = 5.0  # between tries while a run that has ended waits for its copies
REFUSED_SECONDS = 20.0  # for which it tries what was refused: a missing bucket, credentials that have expired


class Exporter:
    """Copies checkpoints and snapshots in a thread of its own. A failure is said and tried again, and never raised.

    It first ends the unfinished uploads of a killed start, and copies what earlier starts left. One per run, on rank 0.
    The run's history is copied before each checkpoint, so that another folder can continue the run from its exports.

    Attributes:
        went_elsewhere: Why this folder may export nothing more, if the run was continued in another one.

    Args:
        settings: Which copies stay.
        retry_seconds: Between two rounds in which a copy failed.
    """

    def __init__(
        self, run: RunDir, export_to: str, *, settings: Checkpoint | None = None, retry_seconds: float = 60.0
    ) -> None:
        self._run = run
        self._export_to = export_to
        self._history = HistoryCopy(run)
        self.went_elsewhere = ""
        self._token = ""
        self._settings = settings or Checkpoint()
        self._retry_seconds = retry_seconds
        self._waiting = committed(run)
        self._there: set[Copied] = set()
        self._lost: set[Copied] = set()
        self._said: dict[str, None] = {}  # problems, in the order in which they came
        self._closing = False
        self._patience: float | None = None  # of `finish`
        self._progressed = time.monotonic()
        self._scanned = False
        self._prunes = self._settings.export_keep_last is not None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="exporter", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """Queues a committed checkpoint, and the snapshot that was committed with it."""
        new = {Copied(step)}
        if (self._run.snapshot(step) / CHECKPOINT_MANIFEST).is_file():
            new.add(Copied(step, is_checkpoint=False))
        with self._changed:
            self._waiting |= new
            self._lost -= new
            self._changed.notify_all()

    def waiting(self) -> set[int]:
        """The steps not copied yet."""
        return {each.step for each in self._left()}

    def _left(self) -> set[Copied]:
        with self._changed:
            return set(self._waiting)

    def close(self, patience: float) -> set[int]:
        """Waits for the queue, `patience` seconds at most. Returns the steps left for the next start."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)
        return self.waiting()

    def finish(self, patience: float) -> str:
        """Copies all that waits, as long as one checkpoint at least is copied every `patience` seconds.

        What fails is tried again meanwhile; what is refused, other than by a full disk, for `REFUSED_SECONDS` only.

        Returns:
            Which steps of this start are not in `export_to`, and why, in one line; empty if all are.
        """
        with self._changed:
            self._patience = patience
            self._progressed = time.monotonic()
        while self._thread.is_alive():
            before = self._left()
            self.close(patience)
            if self._left() == before:
                break
        with self._changed:
            missing = self._waiting | self._lost
            if not missing:
                return ""
            unsaid = "the storage does not answer" if is_waiting() else "copying takes too long"
            return f"step {named(missing)} is not in {self._export_to}: {next(reversed(self._said), unsaid)}"

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._scanned and not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
            try:
                error = self._round()
            except Exception as unexpected:  # whatever it is: later checkpoints must still be copied
                error = self._failed(-1, unexpected)
            if error is not None and self._pause(error):
                return

    def _round(self) -> Exception | None:
        """Copies all that waits. Returns the first error; a checkpoint that can't be copied holds up no other."""
        try:
            storage = exported_run(self._run, self._export_to)
            self._home(storage)
            if not self._scanned:
                storage.abort_uploads(lambda key: key.startswith(("checkpoints/", "snapshots/")))
                self._there = committed(storage)
                self._scanned = True
        except Exception as error:
            if isinstance(error, WentElsewhere):
                self.went_elsewhere = str(error)
            return self._failed(-1, error)
        first = None
        for each in sorted(self._left()):
            try:
                self._home(storage)
                self._history.update(storage)
                self._copy(each, storage)
            except Exception as error:
                if isinstance(error, WentElsewhere):
                    self.went_elsewhere = str(error)
                self._failed(each.step, error, said=first is not None)
                first = first or error
                if isinstance(error, ConnectionError):  # it would answer about the others neither
                    break
        if first is None and self._said and not self._lost:
            say(f"checkpoints are exported to {self._export_to} again")
            self._said.clear()
        if self._prunes:
            self._prune(storage)
        return first

    def _copy(self, each: Copied, exported: Storage) -> None:
        if each not in wanted_copies({*self._there, *self._left()}, self._settings):
            self._forget(each)  # it would only be removed again
            return
        folder, target = self._run.root / each.key, exported.sub(each.key)
        if each in self._there and self._is_copied(folder, target):
            self._forget(each)
            return
        began = time.monotonic()
        event, why = "exported", ""
        try:
            if not (folder / CHECKPOINT_MANIFEST).exists():
                event, why = "export_dropped", "removed here before it could be copied"
            elif not export_checkpoint(folder, target, home=lambda: self._home(exported)):
                event, why = "export_refused", "another of this step is there already; it was not changed"
        except DamagedHere as error:  # it stays so
            event, why = "export_failed", str(error)
        if why:
            self._say(f"step {each}: {why}")
        self._forget(each, lost=bool(why))
        if not why:
            self._there.add(each)
        seconds = round(time.monotonic() - began, 3)
        self._event(event, step=each.step, why=why, seconds=seconds, folder=each.key)

    def _home(self, exported: Storage) -> int:
        """As `must_be_home`, by the token that the folder had first: one that is lost and replaced has another."""
        self._token = self._token or token_of(self._run)
        return must_be_home(exported, self._run, token=self._token)

    def _is_copied(self, folder: Path, target: Storage) -> bool:
        """Whether `target` has a checkpoint of these very files."""
        there = target.read_if_present(CHECKPOINT_MANIFEST)
        with contextlib.suppress(UserError):
            here = copy_manifest(read_manifest(LocalStorage(folder))).to_bytes()
            return there is not None and same_contents(there, here)
        return False

    def _prune(self, storage: Storage) -> None:
        """Removes the copies that are to stay no longer."""
        for each in sorted(self._there - wanted_copies(self._there, self._settings)):
            try:
                remove_copy(storage.sub(each.key))
            except UserError as error:  # not allowed: nobody will change that soon
                self._prunes = False
                say(f"old copies stay in {self._export_to}: {error}")
                return
            self._there.discard(each)
            self._event("export_pruned", step=each.step)

    def _failed(self, step: int, error: Exception, *, said: bool = False) -> Exception:
        """Records an error, and prints it unless the same round has printed one."""
        if not said:
            self._say(str(error), then=f"; tried again every {self._retry_seconds:g} s")
        self._event("export_failed", step=step, why=f"{type(error).__name__}: {error}")
        return error

    def _event(self, event: str, *, step: int, why: str = "", **more: float | str) -> None:
        with contextlib.suppress(OSError, UserError):  # the log may be on the disk that failed
            write_event(self._run, event, step=step, rank=0, why=why, **more)

    def _say(self, problem: str, *, then: str = "") -> None:
        """Prints a problem, and not again until copies work again."""
        if problem not in self._said:
            say(f"checkpoints are not exported to {self._export_to}: {problem}{then}")
        self._said[problem] = None

    def _forget(self, each: Copied, *, lost: bool = False) -> None:
        with self._changed:
            self._waiting.discard(each)
            self._progressed = time.monotonic()
            if lost:
                self._lost.add(each)

    def _pause(self, error: Exception) -> bool:
        """Waits before the next try. Returns whether to give up, as the run is ending."""
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=self._retry_seconds)
                return False
            if self._patience is None or self.went_elsewhere:  # that stays so
                return True
            is_refused = isinstance(error, (UserError, DamagedUpload)) and NO_SPACE not in str(error).lower()
            patience = min(self._patience, REFUSED_SECONDS) if is_refused else self._patience
            if time.monotonic() >= self._progressed + patience:
                return True
            self._changed.wait(min(self._retry_seconds, CLOSING_RETRY_SECONDS))
            return False
