"""Prepares one data set: plan, finished shards, publication. Stores its progress next to the shards until then."""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from cmscale.data.formats import shard_format
from cmscale.errors import UserError
from cmscale.io.image_files import printable
from cmscale.io.locks import hold
from cmscale.io.own_folder import own_folder
from cmscale.io.protocol import Storage
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import (
    DATASET_MANIFEST,
    DatasetManifest,
    read_dataset_manifest,
    read_document,
)
from cmscale.runs.ownership import Ownership, owning
from data_prep.making.documents import (
    PLAN,
    PREPARATION,
    PROGRESS,
    PreparationDocument,
    PreparationPlan,
    document_of,
    manifest_of,
)
from data_prep.making.shards import DatasetSettings, ShardRecord, build_shard, deliver
from data_prep.making.unchanged import changed_shards
from data_prep.sources import ImageSource, SourceReader

_LOCK_SECONDS = 5.0  # the workers of a process that was killed end within a moment
_NAMED = 3


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
        self._ownership: Ownership | None = None

    @property
    def scratch(self) -> Path:
        """The folder that shards are written in before they move to their place: next to it, or in TMPDIR for S3."""
        local = self.storage.local_path(f"{PROGRESS}/scratch{self.lane}")
        if local is not None:
            return local
        shared = Path(tempfile.gettempdir()) / f"cmscale-prepare-{os.getuid()}"
        return own_folder(shared, advice="set TMPDIR to a folder of your own") / f"{self.identity}{self.lane}"

    @property
    def identity(self) -> str:
        """A short name that no other preparation has, wherever the source lies."""
        anywhere = self.plan.model_copy(update={"source": ""})
        return hashlib.sha256(self.storage.url.encode() + anywhere.to_bytes()).hexdigest()[:16]

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
        """Reserves the scratch folder, and a preparation in a storage without local paths for this host.

        Tasks of an array, which have lanes, work for the command that owns it.

        Raises:
            UserError: another process has reserved it.
        """
        path, what = self.scratch.with_suffix(".lock"), f"preparing {self.storage.url}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(hold(path, timeout=_LOCK_SECONDS, what=what))
            if not self.lane and self.storage.local_path("") is None:
                self._ownership = stack.enter_context(owning(self.storage, PROGRESS, what=what))
            yield

    def must_own(self) -> None:
        """Raises TakenOver if another command works on this preparation in this one's place."""
        if self._ownership is not None:
            self._ownership.check()

    @property
    def is_lost(self) -> bool:
        """Whether another command is known to have taken over."""
        return self._ownership is not None and self._ownership.is_lost

    def begin(self) -> None:
        """Stores the plan, or finds the same one there. Changes nothing that is there.

        Raises:
            UserError: an unfinished data set of another plan is there, or other files.
        """
        raw = self.storage.read_if_present(PLAN)
        if raw is None:
            self._refuse_foreign()
            if self.storage.write_if_absent(PLAN, self.plan.to_bytes()):
                return
            raw = self.storage.read(PLAN)  # of a command that began at the same moment
        begun = read_document(PreparationPlan, raw, origin=self.storage.join(PLAN))
        if (difference := begun.difference(self.plan)) is not None:
            raise UserError(
                f"{self.storage.url}: contains an unfinished data set of another source or other settings "
                f"({difference}); finish it with its own command, or use another --out"
            )

    def finished(self, *, is_running: bool = False, check_source: bool = False) -> dict[int, ShardRecord]:
        """The records of the finished shards whose images are unchanged. Call it in `exclusive`, after `begin`.

        Args:
            is_running: Other processes are making the shards now: none is taken from them.
            check_source: Compares the bytes of the images that finished shards were made of; otherwise their sizes
                and times.
        """
        if is_running:
            return self.records()
        self.storage.abort_uploads(self._own_keys().__contains__)  # of a process that was killed
        records = self.records()
        made_of = {n: record.made_of for n, record in records.items() if record.made_of is not None}
        for number in changed_shards(made_of, self.keys, self.read, contents=check_source):
            self.storage.delete(self.record_key(number))
            del records[number]
        return records

    def _own_keys(self) -> set[str]:
        """Every key that a preparation of this plan writes with its data."""
        shards = (self.format.shard_name(number) for number in range(self.num_shards))
        return {*shards, self.format.index_name, PREPARATION, DATASET_MANIFEST}

    def _refuse_foreign(self) -> None:
        """Raises UserError if a new data set would mix with files that no preparation made, or with its own source."""
        ours = f"{PROGRESS}/"
        foreign = (entry.key for entry in self.storage.list() if not entry.key.startswith(ours))
        found = [printable(key) for key in islice(foreign, _NAMED + 1)]
        if found:
            named = ", ".join(found[:_NAMED]) + (", …" if len(found) > _NAMED else "")
            raise UserError(
                f"{self.storage.url}: contains files of something else ({named}); nothing is changed there: use an "
                f"empty folder or another --out"
            )
        out, source = self.storage.local_path(""), Path(self.source.name.partition(":")[2])
        if out is not None and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{self.storage.url}: lies inside the source {source}; use another --out")

    def records(self) -> dict[int, ShardRecord]:
        """Records of the shards that are finished and stored with the recorded size, by number."""
        sizes = {entry.key: entry.size for entry in self.storage.list()}
        numbers = [n for n in range(self.num_shards) if self.record_key(n) in sizes]
        with ThreadPoolExecutor(16) as threads:
            texts = threads.map(lambda n: self.storage.read_if_present(self.record_key(n)), numbers)
            records = {
                n: read_document(ShardRecord, text, origin=self.record_key(n))
                for n, text in zip(numbers, texts, strict=True)
                if text is not None  # a listing may still show what was deleted
            }
        return {
            n: record
            for n, record in records.items()
            if record.entry is None or sizes.get(record.entry.name) == record.entry.size
        }

    def published(self, *, check_source: bool = False) -> DatasetManifest | None:
        """The manifest of the data set if this plan has been published already, else None.

        Args:
            check_source: Compares the bytes of all images with those that the data set was made of; otherwise their
                sizes and times.

        Raises:
            UserError: another data set has been published there, or the images have changed since.
        """
        if self.storage.read_if_present(DATASET_MANIFEST) is None:
            return None
        manifest = read_dataset_manifest(self.storage)
        if self.storage.read_if_present(PREPARATION) is None:
            raise UserError(f"{self.storage.url}: already contains another data set; use another --out")
        document = self.document()
        if (difference := document.plan.difference(self.plan)) is not None:
            raise UserError(f"{self.storage.url}: already contains another data set ({difference}); use another --out")
        if check_source and not document.shards:
            raise UserError(
                f"{self.storage.url}: an earlier version made it and recorded no hashes of the images, so "
                f"--check-source can't compare them; leave the option out, or prepare the data set again"
            )
        changed = changed_shards(dict(enumerate(document.shards)), self.keys, self.read, contents=check_source)
        if changed:
            first = self.keys(changed[0])
            raise UserError(
                f"{self.storage.url}: images have changed since it was made: of {len(changed)} of {self.num_shards} "
                f"shards, first among {first[0]} to {first[-1]}; use another --out, or delete this data set"
            )
        return manifest

    def document(self) -> PreparationDocument:
        """The published account of how the data set was made."""
        origin = self.storage.join(PREPARATION)
        return read_document(PreparationDocument, self.storage.read(PREPARATION), origin=origin)

    def publish(self, records: dict[int, ShardRecord]) -> DatasetManifest:
        """Writes the index, the preparation document and, last, the manifest; then removes the progress records.

        Raises:
            UserError: no image of the source is usable.
        """
        ordered = [records[n] for n in range(self.num_shards)]
        shards = tuple(record.entry for record in ordered if record.entry)
        if not shards:
            raise UserError(f"--source {self.source.name}: none of its {self.plan.keys} images is usable")
        document = document_of(self.plan, ordered, self.source.left_out)
        index = self.format.index_bytes(shards, (span for record in ordered for span in record.spans))
        files = [(self.format.index_name, index), (PREPARATION, document.to_bytes())]
        for name, data in files:
            self.storage.write(name, data)
        manifest = manifest_of(document, shards, files)
        self.must_own()
        if not self.storage.write_if_absent(DATASET_MANIFEST, manifest.to_bytes()):
            raise UserError(f"{self.storage.url}: meanwhile another data set was published there; use another --out")
        self.forget()
        return manifest

    def forget(self) -> None:
        """Removes the progress records and the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        progress = self.storage.local_path(PROGRESS)
        if progress is None:
            self._delete([entry.key for entry in self.storage.list(f"{PROGRESS}/")])
            return
        shutil.rmtree(progress, ignore_errors=True)
        for name in (PREPARATION, DATASET_MANIFEST, self.format.index_name):
            for path in progress.parent.glob(f".{name}.*"):  # half-written by a process that was killed
                path.unlink(missing_ok=True)

    def _delete(self, keys: Iterable[str]) -> None:
        """Deletes objects that nobody needs, where that is allowed."""
        try:
            self.storage.delete_all(keys)
        except UserError as error:
            print(f"note: what is no longer needed stays ({error})", file=sys.stderr)

    def abandon(self) -> None:
        """Leaves nothing behind after a refusal, unless there are finished shards that the same command can use."""
        keys = [entry.key for entry in self.storage.list()]
        if any(re.fullmatch(rf"{PROGRESS}/\d+\.json", key) for key in keys):
            return
        self._delete({self.format.shard_name(n) for n in range(self.num_shards)}.intersection(keys))
        self.forget()
        progress = self.storage.local_path(PROGRESS)
        if progress is not None:
            with contextlib.suppress(OSError):  # not empty, or never made
                progress.parent.rmdir()
