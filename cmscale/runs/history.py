"""Copies what a run's folder holds beside its checkpoints to its exports: config, provenance, logs, results."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cmscale.io.protocol import Storage
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import is_plain_name


def history_files(run: RunDir) -> Iterator[Path]:
    """The files by which another folder can continue the run and show its history; not where the run is placed."""
    for path in (run.config, run.provenance, run.metrics, run.events, run.wandb_id):
        if path.is_file():
            yield path
    for folder, pattern in ((run.evaluations, "**/*.json"), (run.samples, "*.png")):
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(run.root).parts):
                yield path


class HistoryCopy:
    """Copies the files of a run's history to its exports, those alone that have changed since the last time."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._copied: dict[Path, tuple[int, int]] = {}

    def update(self, exported: Storage) -> None:
        """Copies what is new.

        Raises:
            UserError, ConnectionError, OSError: from the storage.
        """
        for path in history_files(self._run):
            with contextlib.suppress(FileNotFoundError):  # an evaluation may replace its own
                state = path.stat()
                version = (state.st_size, state.st_mtime_ns)
                if self._copied.get(path) != version:
                    exported.write(path.relative_to(self._run.root).as_posix(), path.read_bytes())
                    self._copied[path] = version


def fetch_history(exported: Storage, run: RunDir) -> None:
    """Copies the exported history of a run into its folder."""
    for path in (run.config, run.provenance, run.metrics, run.events, run.wandb_id):
        with contextlib.suppress(FileNotFoundError):
            exported.download(path.name, path)
    for folder in (run.evaluations, run.samples):
        for entry in exported.list(f"{folder.name}/"):
            if is_plain_name(entry.key):
                exported.download(entry.key, run.root / entry.key)
