"""Copies checkpoints to another storage: data first, read back and compared, the manifest last."""

import threading
import time
from contextlib import suppress
from pathlib import Path

from cmscale.engine.checkpoint_reader import read_manifest
from cmscale.errors import UserError
from cmscale.io.fetch import file_sha256
from cmscale.io.local import LocalStorage
from cmscale.io.protocol import ArrivedChanged
from cmscale.io.storage import Storage, local_copy
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.copies import exported_run, pending_exports
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, step_name
from cmscale.runs.history import HistoryCopy
from cmscale.runs.homes import WentElsewhere, must_be_home
from cmscale.runs.log import write_event
from cmscale.runs.manifests import FileEntry, read_checkpoint_manifest

CLOSING_RETRY_SECONDS = 5.0  # between tries while a run that has ended waits for its copies
TRIES = 3  # uploads of one file before its checkpoint waits for the next round


class DamagedUpload(RuntimeError):
    """Raised if what was read back is not what was uploaded."""


def export_checkpoint(folder: Path, target: Storage) -> bool:
    """Copies a complete local checkpoint to `target`. Returns whether `target` now holds this checkpoint.

    A target that has a manifest already is not changed.

    Raises:
        DamagedUpload: a file differed after `TRIES` uploads.
        UserError, ConnectionError, OSError: from the storage.
    """
    source = LocalStorage(folder)
    manifest = read_manifest(source)
    present = target.read_if_present(CHECKPOINT_MANIFEST)
    raw = source.read(CHECKPOINT_MANIFEST)
    if present is not None:
        return _same_contents(present, raw)
    for part in manifest.parts:
        _upload_checked(folder / part.file.name, target, part.file)
    return target.write_if_absent(CHECKPOINT_MANIFEST, raw)


def _same_contents(first: bytes, second: bytes) -> bool:
    """Whether two manifests are of the same state and files, by whatever start of the run they were written."""
    if first == second:
        return True
    try:
        one, other = (read_checkpoint_manifest(raw, origin="manifest") for raw in (first, second))
    except UserError:
        return False
    return (one.state, one.quantities, one.parameters, one.parts, one.scalars) == (
        (other.state, other.quantities, other.parameters, other.parts, other.scalars)
    )


def _upload_checked(path: Path, target: Storage, entry: FileEntry) -> None:
    for _ in range(TRIES):
        target.upload(entry.name, path)
        with suppress(ArrivedChanged), local_copy(target, entry.name) as copy:
            if copy.stat().st_size == entry.size and file_sha256(copy) == entry.sha256:
                return
        target.delete(entry.name)
    raise DamagedUpload(f"{target.join(entry.name)}: came back changed, {TRIES} times")


def export_pending(run: RunDir, export_to: str) -> list[int]:
    """Copies what earlier starts left. Returns the steps copied."""
    storage = exported_run(run, export_to)
    done = []
    for step in pending_exports(run, export_to):
        if export_checkpoint(run.checkpoint(step), storage.sub(f"checkpoints/{step_name(step)}")):
            done.append(step)
    return done


class Exporter:
    """Copies checkpoints in a thread of its own. A failure is said, recorded and tried again, and never raised.

    It first ends the unfinished uploads of a killed start, and copies what earlier starts left. One per run, on rank 0.
    The run's history is copied before each checkpoint, so that another folder can continue the run from its exports.

    Attributes:
        went_elsewhere: Why this folder may export nothing more, if the run was continued in another one.
    """

    def __init__(self, run: RunDir, export_to: str, *, retry_seconds: float = 60.0) -> None:
        self._run = run
        self._export_to = export_to
        self._history = HistoryCopy(run)
        self.went_elsewhere = ""
        self._retry_seconds = retry_seconds
        self._waiting = set(committed_steps(run))
        self._lost: set[int] = set()
        self._said: dict[str, None] = {}  # problems, in the order in which they came
        self._closing = False
        self._persists = False
        self._scanned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="exporter", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """Queues a committed checkpoint."""
        with self._changed:
            self._waiting.add(step)
            self._lost.discard(step)
            self._changed.notify_all()

    def waiting(self) -> set[int]:
        """The steps not copied yet."""
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

        Storage that does not answer is asked again meanwhile.

        Returns:
            Which steps of this start are not in `export_to`, and why, in one line; empty if all are.
        """
        self._persists = True
        while self._thread.is_alive():
            before = self.waiting()
            if self.close(patience) == before:
                break
        with self._changed:
            missing = sorted(self._waiting | self._lost)
            if not missing:
                return ""
            steps = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            why = next(reversed(self._said), "copying takes too long")
            return f"step {steps} is not in {self._export_to}: {why}"

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._scanned and not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
            error = self._round()
            if error is not None and self._pause(error):
                return

    def _round(self) -> Exception | None:
        """Copies all that waits. Returns the first error; a checkpoint that can't be copied holds up no other."""
        try:
            storage = exported_run(self._run, self._export_to)
            must_be_home(storage, self._run)
            if not self._scanned:
                storage.abort_uploads()
                self._forget(self._present(storage))
                self._scanned = True
        except Exception as error:
            if isinstance(error, WentElsewhere):
                self.went_elsewhere = str(error)
            return self._failed(-1, error)
        first = None
        for step in sorted(self.waiting()):
            try:
                must_be_home(storage, self._run)
                self._history.update(storage)
                self._copy(step, storage.sub(f"checkpoints/{step_name(step)}"))
            except Exception as error:
                self._failed(step, error, say=first is None)
                first = first or error
                if isinstance(error, ConnectionError):  # it would answer about the others neither
                    break
        if first is None and self._said and not self._lost:
            print(f"checkpoints are exported to {self._export_to} again", flush=True)
            self._said.clear()
        return first

    def _present(self, storage: Storage) -> set[int]:
        """The steps that need no copy: those of which the storage has these very files."""
        found = set()
        for step in set(committed_steps(storage)) & self.waiting():
            there = storage.sub(f"checkpoints/{step_name(step)}").read_if_present(CHECKPOINT_MANIFEST)
            here = LocalStorage(self._run.checkpoint(step)).read_if_present(CHECKPOINT_MANIFEST)
            if there and here and _same_contents(there, here):
                found.add(step)
        return found

    def _failed(self, step: int, error: Exception, *, say: bool = True) -> Exception:
        """Records an error, and prints it unless the same round has printed one."""
        if say:
            self._say(str(error), then=f"; tried again every {self._retry_seconds:g} s")
        with suppress(OSError, UserError):  # the log may be on the disk that failed
            write_event(self._run, "export_failed", step=step, rank=0, why=f"{type(error).__name__}: {error}")
        return error

    def _copy(self, step: int, target: Storage) -> None:
        folder = self._run.checkpoint(step)
        began = time.monotonic()
        event, why = "exported", ""
        if not (folder / CHECKPOINT_MANIFEST).exists():
            event, why = "export_dropped", "removed here before it could be copied"
        elif not export_checkpoint(folder, target):
            event, why = "export_refused", "another checkpoint of this step is there already; it was not changed"
        if why:
            self._say(f"step {step}: {why}")
        self._forget({step}, lost=bool(why))
        seconds = round(time.monotonic() - began, 3)
        with suppress(OSError, UserError):
            write_event(self._run, event, step=step, rank=0, why=why, seconds=seconds)

    def _say(self, problem: str, *, then: str = "") -> None:
        """Prints a problem, and not again until copies work again."""
        if problem not in self._said:
            print(f"checkpoints are not exported to {self._export_to}: {problem}{then}", flush=True)
        self._said[problem] = None

    def _forget(self, steps: set[int], *, lost: bool = False) -> None:
        with self._changed:
            self._waiting -= steps
            if lost:
                self._lost |= steps

    def _pause(self, error: Exception) -> bool:
        """Waits before the next try. Returns whether to give up: the run is ending, and waiting can't help."""
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=self._retry_seconds)
                return False
            # No such bucket, not allowed, a full disk: these stay so.
            if not self._persists or not isinstance(error, OSError):
                return True
            self._changed.wait(min(self._retry_seconds, CLOSING_RETRY_SECONDS))
            return False
