"""Owns one preparation: what is made of what, where its notes lie, and how it is published."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.storage import LocalStorage, S3Storage, Storage, explained, open_storage
from cmscale.runs.manifests import (
    DATASET_MANIFEST,
    DatasetManifest,
    Document,
    FileEntry,
    dataset_fingerprint,
    read_dataset_manifest,
    read_document,
)
from data_prep.preprocess import ENCODINGS, RECIPES
from data_prep.shards import Record, Settings, build_shard, deliver, index_file
from data_prep.sources import Reader, Source

PREPARATION = "preparation.json"
PROGRESS = ".progress"


class Plan(Document):
    """What is being made of what; the same plan continues an interrupted one."""

    settings: Settings
    source: str
    keys: int
    keys_sha256: str


class Preparation(Document):
    """Published beside the shards: how they were made, enough to make any of them again."""

    plan: Plan
    recipe: str
    encoding: str
    skipped: tuple[tuple[str, str], ...]


class Job:
    """One preparation: its source, its plan, and where it goes. Tasks that work at the same one have a `lane` each."""

    def __init__(self, source: Source, settings: Settings, out: str, *, lane: str = "") -> None:
        self.lane = lane
        self.source = source
        self.settings = settings
        self.storage: Storage = open_storage(out)
        self.plan = Plan(settings=settings, source=source.name, keys=len(source.keys), keys_sha256=source.digest())
        self.num_shards = -(-len(source.keys) // settings.samples_per_shard)
        self.read = Reader(source)

    @property
    def scratch(self) -> Path:
        """Where shards are written before they move to their place: beside it, or in TMPDIR for S3."""
        if isinstance(self.storage, LocalStorage):
            return self.storage.root / PROGRESS / f"scratch{self.lane}"
        return Path(tempfile.gettempdir()) / f"cmscale-prepare-{os.getuid()}-{self.identity}{self.lane}"

    @property
    def identity(self) -> str:
        """Short, and no other preparation's."""
        return hashlib.sha256(self.storage.url.encode() + self.plan.to_bytes()).hexdigest()[:16]

    def keys(self, number: int) -> list[str]:
        size = self.settings.samples_per_shard
        return self.source.keys[number * size : (number + 1) * size]

    def record_key(self, number: int) -> str:
        return f"{PROGRESS}/{number:06d}.json"

    def make(self, number: int, *, max_bad: int, tick: Callable[[], None]) -> Record:
        """Makes shard `number`, puts it in its place, notes it."""
        record, path = build_shard(
            self.keys(number),
            self.read,
            settings=self.settings,
            number=number,
            folder=self.scratch / f"{number:06d}",
            max_bad=max_bad,
            tick=tick,
        )
        if record.entry:
            deliver(path, self.storage, record.entry.name)
        self.storage.write(self.record_key(number), record.to_bytes())
        shutil.rmtree(path.parent, ignore_errors=True)
        return record

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the scratch folder. Raises UserError while another process does the same."""
        path = self.scratch.with_suffix(".lock")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            for attempt in range(50):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == 49:
                        raise UserError(
                            f"{self.storage.url}: another prepare.py is writing there; wait for it"
                        ) from None
                    time.sleep(0.1)  # the workers of one that was killed end in a moment
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def begin(self) -> dict[int, Record]:
        """Notes the plan, or finds an interrupted run's. Returns the shards that are finished.

        Raises:
            UserError: something else is being made there.
        """
        if isinstance(self.storage, S3Storage):
            self.storage.abort_uploads()  # of a run that was killed
        raw = self.storage.read_if_present(f"{PROGRESS}/plan.json")
        if raw is None:
            self.storage.write(f"{PROGRESS}/plan.json", self.plan.to_bytes())
            return {}
        if raw != self.plan.to_bytes():
            raise UserError(
                f"{self.storage.url}: an unfinished data set of another source or other settings is there; "
                f"finish it with its own command, or use another --out"
            )
        return self.records()

    def records(self) -> dict[int, Record]:
        """The shards that are finished, by number."""
        sizes = {entry.key: entry.size for entry in self.storage.list()}
        numbers = [n for n in range(self.num_shards) if self.record_key(n) in sizes]
        with ThreadPoolExecutor(16) as threads:
            texts = threads.map(lambda n: self.storage.read(self.record_key(n)), numbers)
            records = {
                n: read_document(Record, text, origin=self.record_key(n))
                for n, text in zip(numbers, texts, strict=True)
            }
        return {
            n: record
            for n, record in records.items()
            if record.entry is None or sizes.get(record.entry.name) == record.entry.size
        }

    def published(self) -> DatasetManifest | None:
        """The finished data set, where this very plan was published before.

        Raises:
            UserError: another data set is there.
        """
        if self.storage.read_if_present(DATASET_MANIFEST) is None:
            return None
        manifest = read_dataset_manifest(self.storage)
        raw = self.storage.read_if_present(PREPARATION)
        if raw is None or read_document(Preparation, raw, origin=PREPARATION).plan != self.plan:
            raise UserError(f"{self.storage.url}: another data set is there already; use another --out")
        return manifest

    def publish(self, records: dict[int, Record]) -> DatasetManifest:
        """Writes index, preparation and, last, the manifest; then removes the notes."""
        ordered = [records[n] for n in range(self.num_shards)]
        shards = tuple(record.entry for record in ordered if record.entry)
        skipped = tuple(pair for record in ordered for pair in record.bad)
        if not shards:
            raise UserError(f"--source {self.source.name}: none of its {self.plan.keys} images can be used")
        settings = self.settings
        preparation = Preparation(
            plan=self.plan,
            recipe=RECIPES[settings.preprocess],
            encoding=ENCODINGS[settings.encoding],
            skipped=skipped,
        )
        files = [index_file(settings, ordered), (PREPARATION, preparation.to_bytes())]
        for name, data in files:
            self.storage.write(name, data)
        manifest = DatasetManifest(
            format=settings.format,
            image_size=settings.image_size,
            preprocess=settings.preprocess,
            encoding=settings.encoding,
            source=self.source.name,
            count=sum(shard.count for shard in shards),
            skipped=len(skipped),
            shards=shards,
            files=tuple(
                FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files
            ),
            fingerprint=dataset_fingerprint(
                format=settings.format,
                image_size=settings.image_size,
                preprocess=settings.preprocess,
                encoding=settings.encoding,
                shards=shards,
            ),
        )
        self.storage.write(DATASET_MANIFEST, manifest.to_bytes())
        self.forget()
        return manifest

    def forget(self) -> None:
        """Removes the notes and the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        if isinstance(self.storage, LocalStorage):
            shutil.rmtree(self.storage.root / PROGRESS, ignore_errors=True)
            for pattern in (
                f".{PREPARATION}.*",
                f".{DATASET_MANIFEST}.*",
                ".index.*",
            ):  # of a run that was killed
                for path in self.storage.root.glob(pattern):
                    path.unlink(missing_ok=True)
        else:
            for entry in list(self.storage.list(f"{PROGRESS}/")):
                self.storage.delete(entry.key)

    def abandon(self) -> None:
        """After a refusal: leaves nothing behind, unless finished shards are there for the same command to
        use."""
        notes = (entry.key for entry in self.storage.list(f"{PROGRESS}/"))
        if not any(re.fullmatch(rf"{PROGRESS}/\d+\.json", key) for key in notes):
            self.forget()
            if isinstance(self.storage, LocalStorage):
                with contextlib.suppress(OSError):  # holds other things, or was never made
                    self.storage.root.rmdir()
