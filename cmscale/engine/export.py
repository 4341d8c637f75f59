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
from cmscale.io.storage import Storage, local_copy, open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, step_name
from cmscale.runs.log import write_event
from cmscale.runs.manifests import FileEntry

TRIES = 3  # uploads of one file before its checkpoint waits for the next round


class DamagedUpload(RuntimeError):
    """Raised if what was read back is not what was uploaded."""


def exported_run(run: RunDir, export_to: str) -> Storage:
    """The storage of a run's copies: `export_to` and the run's name. Its layout is that of the run's folder."""
    return open_storage(export_to).sub(run.name)


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
        return present == raw
    for part in manifest.parts:
        _upload_checked(folder / part.file.name, target, part.file)
    return target.write_if_absent(CHECKPOINT_MANIFEST, raw)


def _upload_checked(path: Path, target: Storage, entry: FileEntry) -> None:
    for _ in range(TRIES):
        target.upload(entry.name, path)
        with suppress(ArrivedChanged), local_copy(target, entry.name) as copy:
            if copy.stat().st_size == entry.size and file_sha256(copy) == entry.sha256:
                return
        target.delete(entry.name)
    raise DamagedUpload(f"{target.join(entry.name)}: came back changed, {TRIES} times")


def pending_exports(run: RunDir, export_to: str) -> list[int]:
    """The steps whose checkpoints are committed in the run's folder and not in `export_to`, oldest first."""
    remote = set(committed_steps(exported_run(run, export_to)))
    return [step for step in committed_steps(run) if step not in remote]


def export_pending(run: RunDir, export_to: str) -> list[int]:
    """Copies what earlier starts left. Returns the steps copied."""
    storage = exported_run(run, export_to)
    done = []
    for step in pending_exports(run, export_to):
        if export_checkpoint(run.checkpoint(step), storage.sub(f"checkpoints/{step_name(step)}")):
            done.append(step)
    return done


class Exporter:
    """Copies checkpoints in a thread of its own. A failure is recorded, tried again, and never raised.

    It first ends the unfinished uploads of a killed start, and copies what earlier starts left. One per run, on rank 0.
    """

    def __init__(self, run: RunDir, export_to: str, *, retry_seconds: float = 60.0) -> None:
        self._run = run
        self._export_to = export_to
        self._retry_seconds = retry_seconds
        self._waiting = set(committed_steps(run))
        self._closing = False
        self._scanned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="exporter", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> None:
        """Queues a committed checkpoint."""
        with self._changed:
            self._waiting.add(step)
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

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._scanned and not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
            if not self._round() and self._pause():
                return

    def _round(self) -> bool:
        """Copies all that waits. Returns whether nothing failed."""
        step = -1
        try:
            storage = exported_run(self._run, self._export_to)
            if not self._scanned:
                storage.abort_uploads()
                self._forget(set(committed_steps(storage)))
                self._scanned = True
            for step in sorted(self.waiting()):
                self._copy(step, storage.sub(f"checkpoints/{step_name(step)}"))
                self._forget({step})
        except Exception as error:
            with suppress(OSError, UserError):  # the log may be on the disk that failed
                write_event(self._run, "export_failed", step=step, rank=0, why=f"{type(error).__name__}: {error}")
            return False
        return True

    def _copy(self, step: int, target: Storage) -> None:
        folder = self._run.checkpoint(step)
        began = time.monotonic()
        event, why = "exported", ""
        if not (folder / CHECKPOINT_MANIFEST).exists():
            event, why = "export_dropped", "removed here before it could be copied"
        elif not export_checkpoint(folder, target):
            event, why = "export_refused", "another checkpoint of this step is there already; it was not changed"
        seconds = round(time.monotonic() - began, 3)
        write_event(self._run, event, step=step, rank=0, why=why, seconds=seconds)

    def _forget(self, steps: set[int]) -> None:
        with self._changed:
            self._waiting -= steps

    def _pause(self) -> bool:
        """Waits before the next try. Returns whether to give up because the run is ending."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=self._retry_seconds)
            return self._closing
