"""Owns the command that turns a source of images into a prepared data set, on disk or on S3.

    python data_prep/prepare.py --source lsun:DIR|folder:DIR|zip:FILE|tars:DIR --format mds|webdataset --out
    DIR|s3://...

Shard k holds the k-th `--samples-per-shard` keys of the sorted source, so each is made by itself, by any
worker, with the same bytes. A finished shard is noted under `.progress/`; the same command continues after an
interruption. The manifest is written last: without it there is no data set.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

from cmscale.errors import UserError
from cmscale.manifests import (
    DATASET_MANIFEST,
    DatasetManifest,
    Document,
    FileEntry,
    dataset_fingerprint,
    read_dataset_manifest,
    read_document,
)
from cmscale.storage import LocalStorage, Storage, open_storage
from data_prep.preprocess import ENCODINGS, RECIPES
from data_prep.progress import Ticker
from data_prep.shards import Record, Settings, TooManyBad, build_shard, deliver, index_file
from data_prep.sources import Reader, Source, open_source

PREPARATION = "preparation.json"
PROGRESS = ".progress"
_NAMED = 5


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
    """One preparation: its source, its plan, and where it goes."""

    def __init__(self, source: Source, settings: Settings, out: str) -> None:
        self.source = source
        self.settings = settings
        self.storage: Storage = open_storage(out)
        self.plan = Plan(
            settings=settings, source=source.name, keys=len(source.keys), keys_sha256=source.digest()
        )
        self.num_shards = -(-len(source.keys) // settings.samples_per_shard)
        self.read = Reader(source)

    @property
    def scratch(self) -> Path:
        """Where shards are written before they move to their place: beside it, or in TMPDIR for S3."""
        if isinstance(self.storage, LocalStorage):
            return self.storage.root / PROGRESS / "scratch"
        identity = hashlib.sha256(self.storage.url.encode() + self.plan.to_bytes()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"cmscale-prepare-{os.getuid()}-{identity}"

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

    def begin(self) -> dict[int, Record]:
        """Notes the plan, or finds an interrupted run's. Returns the shards that are finished.

        Raises:
            UserError: something else is being made there.
        """
        raw = self.storage.read_if_present(f"{PROGRESS}/plan.json")
        if raw is None:
            self.storage.write(f"{PROGRESS}/plan.json", self.plan.to_bytes())
            return {}
        if raw != self.plan.to_bytes():
            raise UserError(
                f"{self.storage.url}: an unfinished data set of another source or with other settings is there; "
                f"finish it with its own command, or use another --out"
            )
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
                FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
                for name, data in files
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
        noted = [entry.key for entry in self.storage.list(f"{PROGRESS}/")]
        if noted in ([f"{PROGRESS}/plan.json"], []):
            self.forget()
            if isinstance(self.storage, LocalStorage) and self.storage.root.is_dir():
                if not any(self.storage.root.iterdir()):
                    self.storage.root.rmdir()


def prepare(job: Job, *, workers: int, max_bad: int, say: Callable[[str], None] = print) -> DatasetManifest:
    """Makes and publishes the data set; continues an interrupted run of the same plan.

    Raises:
        UserError: what a user can mend; nothing is published.
    """
    finished = job.published()
    if finished is not None:
        say("already prepared")
        job.forget()
        return finished
    try:
        records = job.begin()
        if records:
            say(f"continuing: {len(records)} of {job.num_shards} shards are there")
        _make_all(job, records, workers=workers, max_bad=max_bad)
        return job.publish(records)
    except UserError:
        job.abandon()
        raise


def _make_all(job: Job, records: dict[int, Record], *, workers: int, max_bad: int) -> None:
    """Adds the missing shards' records, while the unusable images stay within the budget."""
    missing = [n for n in range(job.num_shards) if n not in records]
    _check_budget(records.values(), max_bad)
    with Ticker(total=job.plan.keys, done=sum(len(job.keys(n)) for n in records)) as ticker:
        if workers == 1 or len(missing) <= 1:
            for number in missing:
                records[number] = _make_one(job, number, max_bad, ticker.tick)
                _check_budget(records.values(), max_bad)
                ticker.show()
            return
        _make_in_processes(job, records, missing, workers=workers, max_bad=max_bad, ticker=ticker)


def _make_in_processes(
    job: Job, records: dict[int, Record], missing: list[int], *, workers: int, max_bad: int, ticker: Ticker
) -> None:
    if job.settings.format == "mds":
        import streaming.base.format.mds  # noqa: F401  once, before the fork
    # Forked: the source's list of keys is shared, not copied, and the imports are done.
    pool = ProcessPoolExecutor(
        min(workers, len(missing)),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(job, max_bad, ticker.tick),
    )
    try:
        pending: dict[Future[Record], int] = {
            pool.submit(_make_in_worker, number): number for number in missing
        }
        while pending:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                records[pending.pop(future)] = future.result()
            _check_budget(records.values(), max_bad)
            ticker.show()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Job, int, Callable[[], None]] | None = None


def _start_worker(job: Job, max_bad: int, tick: Callable[[], None]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker = (job, max_bad, tick)


def _make_in_worker(number: int) -> Record:
    assert _worker is not None
    job, max_bad, tick = _worker
    return _make_one(job, number, max_bad, tick)


def _make_one(job: Job, number: int, max_bad: int, tick: Callable[[], None]) -> Record:
    try:
        return job.make(number, max_bad=max_bad, tick=tick)
    except TooManyBad as error:
        raise _too_many(error.bad, max_bad) from None
    except UserError:
        shutil.rmtree(job.scratch / f"{number:06d}", ignore_errors=True)
        raise


def _check_budget(records: Iterable[Record], max_bad: int) -> None:
    bad = [pair for record in records for pair in record.bad]
    if len(bad) > max_bad:
        raise _too_many(bad, max_bad)


def _too_many(bad: Sequence[tuple[str, str]], max_bad: int) -> UserError:
    named = "; ".join(f"{key}: {why}" for key, why in bad[:_NAMED])
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return UserError(
        f"at least {len(bad)} images can't be used, --max-bad allows {max_bad} ({named}{more}); mend them, or skip "
        f"them with --max-bad N (the same command continues with the shards that are finished)"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare.py", description="Images to shards, on disk or on S3.")
    parser.add_argument("--source", required=True, help="lsun:DIR, folder:DIR, zip:FILE or tars:DIR")
    parser.add_argument("--format", required=True, choices=["mds", "webdataset"])
    parser.add_argument("--out", required=True, help="a folder or s3://BUCKET/PREFIX")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)"
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument(
        "--preprocess", choices=sorted(RECIPES), default="adm", help="which published crop and resize"
    )
    parser.add_argument("--encoding", choices=sorted(ENCODINGS), default="jpeg")
    parser.add_argument("--samples-per-shard", type=int, default=1024)
    parser.add_argument(
        "--max-bad", type=int, default=0, help="unusable images to skip before refusing (default: 0)"
    )
    options = parser.parse_args(arguments)
    for name, least in (("workers", 1), ("image_size", 1), ("samples_per_shard", 1), ("max_bad", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} must be at least {least}")
    return options


def run(arguments: Sequence[str] | None = None) -> None:
    """The command, with its exceptions."""
    options = parse(arguments)
    settings = Settings(
        format=options.format,
        image_size=options.image_size,
        preprocess=options.preprocess,
        encoding=options.encoding,
        samples_per_shard=options.samples_per_shard,
    )
    job = Job(open_source(options.source), settings, options.out)
    manifest = prepare(job, workers=options.workers, max_bad=options.max_bad)
    print(f"{manifest.count} images in {len(manifest.shards)} shards, {manifest.skipped} skipped")
    print(f"fingerprint: {manifest.fingerprint}")
    print(f"dataset: {job.storage.url}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 with one line for a user's mistake, or 1 with one line where storage fails."""
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ConnectionError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
