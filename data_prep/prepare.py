"""Owns the command that turns a source of images into a prepared data set, on disk or on S3.

    python data_prep/prepare.py --source lsun:DIR|folder:DIR|zip:FILE|tars:DIR --format mds|webdataset
        --out DIR|s3://... [--workers W] [--slurm --nodes N]

Shard k holds the k-th `--samples-per-shard` keys of the sorted source, so each is made by itself, by any
worker, with the same bytes. A finished shard is noted under `.progress/`; the same command continues after an
interruption. The manifest is written last: without it there is no data set.
"""

import argparse
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

from cmscale.errors import UserError
from cmscale.runs.manifests import DatasetManifest
from data_prep.job import Job
from data_prep.preprocess import ENCODINGS, RECIPES
from data_prep.progress import Ticker
from data_prep.shards import Record, Settings, TooManyBad
from data_prep.slurm_array import ArrayFailed, Cluster, running, share
from data_prep.sources import open_source

_NAMED = 5
_PR_SET_PDEATHSIG = 1


def prepare(
    job: Job,
    *,
    workers: int,
    max_bad: int,
    cluster: Cluster | None = None,
    say: Callable[[str], None] = print,
) -> DatasetManifest:
    """Makes and publishes the data set, here or on a cluster; continues an interrupted run of the same plan.

    Raises:
        UserError: what a user can mend; nothing is published.
    """
    finished = job.published()
    if finished is not None:
        say("already prepared")
        job.forget()
        return finished
    array = running(job) if cluster else None
    records = job.records() if array else job.begin()
    if records and not array:
        say(f"continuing: {len(records)} of {job.num_shards} shards are there")
    try:
        with job.alone():
            return _make_and_publish(job, records, workers=workers, max_bad=max_bad, cluster=cluster, array=array)
    finally:
        job.read.close()


def _make_and_publish(
    job: Job, records: dict[int, Record], *, workers: int, max_bad: int, cluster: Cluster | None, array: str | None
) -> DatasetManifest:
    try:
        missing = [n for n in range(job.num_shards) if n not in records]
        if cluster and missing:
            records = share(job, cluster, array=array, max_bad=max_bad)
            _check_budget(records.values(), max_bad)
        else:
            make_missing(job, records, missing, workers=workers, max_bad=max_bad)
        return job.publish(records)
    except UserError:
        job.abandon()
        raise


def make_missing(job: Job, records: dict[int, Record], missing: list[int], *, workers: int, max_bad: int) -> None:
    """Adds the missing shards' records, while the unusable images stay within the budget."""
    _check_budget(records.values(), max_bad)
    done = sum(len(job.keys(n)) for n in records)
    with Ticker(total=done + sum(len(job.keys(n)) for n in missing), done=done) as ticker:
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
        pending: dict[Future[Record], int] = {pool.submit(_make_in_worker, number): number for number in missing}
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
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # or a killed parent's workers would write on
    _worker = (job, max_bad, tick)


def _make_in_worker(number: int) -> Record:
    assert _worker is not None
    job, max_bad, tick = _worker
    return _make_one(job, number, max_bad, tick)


def _make_one(job: Job, number: int, max_bad: int, tick: Callable[[], None]) -> Record:
    try:
        return job.make(number, max_bad=max_bad, tick=tick)
    except TooManyBad as error:
        shutil.rmtree(job.scratch / f"{number:06d}", ignore_errors=True)
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
        f"at least {len(bad)} images can't be used, --max-bad allows {max_bad} ({named}{more}); mend, or "
        f"skip them with --max-bad N (the same command continues with the shards that are finished)"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, its limits held; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="prepare.py", description="Images to shards, on disk or on S3.")
    parser.add_argument("--source", required=True, help="lsun:DIR, folder:DIR, zip:FILE or tars:DIR")
    parser.add_argument("--format", required=True, choices=["mds", "webdataset"])
    parser.add_argument("--out", required=True, help="a folder or s3://BUCKET/PREFIX")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--preprocess", choices=sorted(RECIPES), default="adm", help="which published crop and resize")
    parser.add_argument("--encoding", choices=sorted(ENCODINGS), default="jpeg")
    parser.add_argument("--samples-per-shard", type=int, default=1024)
    parser.add_argument("--max-bad", type=int, default=0, help="unusable images to skip (default: 0)")
    parser.add_argument("--slurm", action="store_true", help="as a Slurm array, one task a node")
    parser.add_argument("--nodes", type=int, default=1, help="with --slurm: tasks; each runs --workers processes")
    parser.add_argument("--partition", help="with --slurm")
    parser.add_argument("--time", type=int, default=1440, metavar="MINUTES", help="with --slurm: a task's limit")
    options = parser.parse_args(arguments)
    for name, least in (
        ("workers", 1),
        ("image_size", 1),
        ("samples_per_shard", 1),
        ("max_bad", 0),
        ("nodes", 1),
        ("time", 1),
    ):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} must be at least {least}")
    if not options.slurm and (options.nodes > 1 or options.partition):
        parser.error("--nodes and --partition: go with --slurm")
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
    cluster = None
    if options.slurm:
        cluster = Cluster(nodes=options.nodes, cpus=options.workers, minutes=options.time, partition=options.partition)
    manifest = prepare(job, workers=options.workers, max_bad=options.max_bad, cluster=cluster)
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
    except (ConnectionError, ArrayFailed) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
