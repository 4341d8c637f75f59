"""Prepares one data set: plan, finished shards, publication. Stores its progress next to the shards until then."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmscale.data.formats import shard_format
from cmscale.errors import UserError
from cmscale.io.locks import hold
from cmscale.io.protocol import Storage
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import (
    DATASET_MANIFEST,
    DatasetManifest,
    Document,
    FileEntry,
    dataset_fingerprint,
    read_dataset_manifest,
    read_document,
)
from data_prep.making.convert import ENCODINGS, RECIPES
from data_prep.making.shards import DatasetSettings, ShardRecord, build_shard, deliver
from data_prep.sources import ImageSource, SourceReader

PREPARATION = "preparation.json"
PROGRESS = ".progress"
_LOCK_SECONDS = 5.0  # the workers of a process that was killed end within a moment


class PreparationPlan(Document):
    """What is made of what; an interrupted preparation is continued by one with the same plan."""

    settings: DatasetSettings
    source: str
    keys: int
    keys_sha256: str


class PreparationDocument(Document):
    """Published with the shards: how they were made, enough to make any of them again."""

    plan: PreparationPlan
    recipe: str
    encoding: str
    skipped: tuple[tuple[str, str], ...]


class Preparation:
    """One preparation: a source, a plan and a destination.

    Tasks that work on the same preparation at the same time each have a `lane`, a suffix of their scratch folder.
    """

    def __init__(self, source: ImageSource, settings: DatasetSettings, out: str, *, lane: str = "") -> None:
        self.lane = lane
        self.source = source
        self.settings = settings
        self.format = shard_format(settings.format)
        self.storage: Storage = open_storage(out)
        self.plan = PreparationPlan(
            settings=settings, source=source.name, keys=len(source.keys), keys_sha256=source.digest()
        )
        self.num_shards = -(-len(source.keys) // settings.samples_per_shard)
        self.read = SourceReader(source)

    @property
    def scratch(self) -> Path:
        """The folder that shards are written in before they move to their place: next to it, or in TMPDIR for S3."""
        local = self.storage.local_path(f"{PROGRESS}/scratch{self.lane}")
        return local or Path(tempfile.gettempdir()) / f"cmscale-prepare-{os.getuid()}-{self.identity}{self.lane}"

    @property
    def identity(self) -> str:
        """A short name that no other preparation has."""
        return hashlib.sha256(self.storage.url.encode() + self.plan.to_bytes()).hexdigest()[:16]

    def keys(self, number: int) -> list[str]:
        """The source's keys that shard `number` is made of."""
        size = self.settings.samples_per_shard
        return self.source.keys[number * size : (number + 1) * size]

    def record_key(self, number: int) -> str:
        """Where the record of shard `number` is stored."""
        return f"{PROGRESS}/{number:06d}.json"

    def make(self, number: int, *, max_bad: int, tick: Callable[[], None]) -> ShardRecord:
        """Makes shard `number`, moves it to its place and stores its record.

        Raises:
            TooManyBad: more than `max_bad` images are unusable.
            UserError: there is no space left, or the shard is too large for its format.
        """
        folder = self.scratch / f"{number:06d}"
        try:
            record, path = build_shard(
                self.keys(number),
                self.read,
                settings=self.settings,
                number=number,
                folder=folder,
                max_bad=max_bad,
                tick=tick,
            )
            if record.entry:
                deliver(path, self.storage, record.entry.name)
            self.storage.write(self.record_key(number), record.to_bytes())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return record

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Reserves the scratch folder. Raises UserError if another process has reserved it."""
        path = self.scratch.with_suffix(".lock")
        with hold(path, timeout=_LOCK_SECONDS, what=f"preparing {self.storage.url}"):
            yield

    def begin(self) -> dict[int, ShardRecord]:
        """Stores the plan, or continues an interrupted preparation. Returns the records of the finished shards.

        Raises:
            UserError: an unfinished data set of another plan is there.
        """
        self.storage.abort_uploads()  # of a process that was killed
        raw = self.storage.read_if_present(f"{PROGRESS}/plan.json")
        if raw is None:
            self.storage.write(f"{PROGRESS}/plan.json", self.plan.to_bytes())
            return {}
        if raw != self.plan.to_bytes():
            raise UserError(
                f"{self.storage.url}: contains an unfinished data set of another source or other settings; "
                f"finish it with its own command, or use another --out"
            )
        return self.records()

    def records(self) -> dict[int, ShardRecord]:
        """Records of the shards that are finished and stored with the recorded size, by number."""
        sizes = {entry.key: entry.size for entry in self.storage.list()}
        numbers = [n for n in range(self.num_shards) if self.record_key(n) in sizes]
        with ThreadPoolExecutor(16) as threads:
            texts = threads.map(lambda n: self.storage.read(self.record_key(n)), numbers)
            records = {
                n: read_document(ShardRecord, text, origin=self.record_key(n))
                for n, text in zip(numbers, texts, strict=True)
            }
        return {
            n: record
            for n, record in records.items()
            if record.entry is None or sizes.get(record.entry.name) == record.entry.size
        }

    def published(self) -> DatasetManifest | None:
        """The manifest of the data set if this plan has been published already, else None.

        Raises:
            UserError: another data set has been published there.
        """
        if self.storage.read_if_present(DATASET_MANIFEST) is None:
            return None
        manifest = read_dataset_manifest(self.storage)
        raw = self.storage.read_if_present(PREPARATION)
        if raw is None or read_document(PreparationDocument, raw, origin=PREPARATION).plan != self.plan:
            raise UserError(f"{self.storage.url}: already contains another data set; use another --out")
        return manifest

    def publish(self, records: dict[int, ShardRecord]) -> DatasetManifest:
        """Writes the index, the preparation document and, last, the manifest; then removes the progress records.

        Raises:
            UserError: no image of the source is usable.
        """
        ordered = [records[n] for n in range(self.num_shards)]
        shards = tuple(record.entry for record in ordered if record.entry)
        skipped = tuple(pair for record in ordered for pair in record.bad)
        if not shards:
            raise UserError(f"--source {self.source.name}: none of its {self.plan.keys} images is usable")
        settings = self.settings
        document = PreparationDocument(
            plan=self.plan,
            recipe=RECIPES[settings.preprocess],
            encoding=ENCODINGS[settings.encoding],
            skipped=skipped,
        )
        index = self.format.index_bytes(shards, (span for record in ordered for span in record.spans))
        files = [(self.format.index_name, index), (PREPARATION, document.to_bytes())]
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
        """Removes the progress records and the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        progress = self.storage.local_path(PROGRESS)
        if progress is None:
            for entry in list(self.storage.list(f"{PROGRESS}/")):
                self.storage.delete(entry.key)
            return
        shutil.rmtree(progress, ignore_errors=True)
        for name in (PREPARATION, DATASET_MANIFEST, self.format.index_name):
            for path in progress.parent.glob(f".{name}.*"):  # half-written by a process that was killed
                path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leaves nothing behind after a refusal, unless there are finished shards that the same command can use."""
        keys = (entry.key for entry in self.storage.list(f"{PROGRESS}/"))
        if any(re.fullmatch(rf"{PROGRESS}/\d+\.json", key) for key in keys):
            return
        self.forget()
        progress = self.storage.local_path(PROGRESS)
        if progress is not None:
            with contextlib.suppress(OSError):  # not empty, or never made
                progress.parent.rmdir()
