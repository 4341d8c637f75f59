"""Makes the missing shards of a preparation on this machine, in one process or several."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType

from cmscale.errors import UserError
from cmscale.io import interrupts
from cmscale.io.process import die_with_parent
from data_prep.making.preparation import Preparation
from data_prep.making.progress import ProgressCounter
from data_prep.making.shards import ShardRecord, TooManyBad

_BAD_IMAGES_NAMED = 5


def make_missing(
    preparation: Preparation, records: dict[int, ShardRecord], missing: list[int], *, workers: int, max_bad: int
) -> None:
    """Makes the shards `missing` and adds their records to `records`.

    Raises:
        UserError: more than `max_bad` images are unusable, or a shard cannot be written.
    """
    check_bad(records.values(), max_bad)
    done = sum(len(preparation.keys(n)) for n in records)
    total = done + sum(len(preparation.keys(n)) for n in missing)
    if missing:
        preparation.format.preload()  # first: the time left is computed from that of the images
    with ProgressCounter("preparing", total=total, done=done) as counter:
        if workers > 1 and len(missing) > 1:
            with _pool(preparation, min(workers, len(missing)), max_bad, counter) as submit:
                pending = {submit(number): number for number in missing}
                _collect(preparation, pending, records, max_bad=max_bad, counter=counter)
        else:

            def tick() -> None:
                counter.tick()
                counter.show()

            for number in missing:
                records[number] = _make_one(preparation, number, max_bad, tick)
                _must_own(preparation)
                check_bad(records.values(), max_bad)


def check_bad(records: Iterable[ShardRecord], max_bad: int) -> None:
    """Raises UserError if the shards have more unusable images than are allowed."""
    bad = [pair for record in records for pair in record.bad]
    if len(bad) > max_bad:
        raise _too_many(bad, max_bad)


@contextmanager
def _pool(
    preparation: Preparation, workers: int, max_bad: int, counter: ProgressCounter
) -> Iterator[Callable[[int], Future[ShardRecord]]]:
    """Gives a function that has one of several processes make a shard.

    Raises:
        UserError: a process ended without an exception.
    """
    # Forked: the source's list of keys is shared instead of copied, and modules are already imported.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(preparation, max_bad, counter.tick),
    )
    started: list[BaseProcess] = []

    def submit(number: int) -> Future[ShardRecord]:
        future = pool.submit(_make_in_worker, number)
        if not started:
            started.extend(multiprocessing.active_children())
        return future

    try:
        yield submit
    except BrokenProcessPool:
        raise _worker_died(started, preparation) from None
    except KeyboardInterrupt:
        for worker in started:
            worker.terminate()  # it removes what it has of its shard
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(
    preparation: Preparation,
    pending: dict[Future[ShardRecord], int],
    records: dict[int, ShardRecord],
    *,
    max_bad: int,
    counter: ProgressCounter,
) -> None:
    """Adds the records of shards to `records` as they are finished."""
    while pending:
        done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            records[pending.pop(future)] = future.result()
        check_bad(records.values(), max_bad)
        _must_own(preparation)
        counter.show()


def _must_own(preparation: Preparation) -> None:
    """Raises TakenOver once another command is known to have taken over."""
    if preparation.is_lost:
        preparation.must_own()


def _worker_died(workers: Iterable[BaseProcess], preparation: Preparation) -> UserError:
    """The error for a worker that ended without an exception."""
    signals = []
    for worker in workers:
        worker.join(timeout=5)
        if worker.exitcode is not None and worker.exitcode < 0:
            signals.append(-worker.exitcode)
    crashed = next((number for number in signals if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)), None)
    if crashed is not None:
        name = signal.Signals(crashed).name
        return UserError(
            f"--source {preparation.source.name}: damaged, or a decoder failed: reading it ended a worker by {name}; "
            "copy it again, then the same command continues"
        )
    return UserError(
        "a worker was killed, as the system does when memory runs out; use fewer --workers, or request more memory "
        "(the same command continues)"
    )


_worker: tuple[Preparation, int, Callable[[], None]] | None = None
_is_making = False


def _start_worker(preparation: Preparation, max_bad: int, tick: Callable[[], None]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, _stop)
    die_with_parent(signal.SIGKILL)  # otherwise the workers of a killed parent would go on writing
    _worker = (preparation, max_bad, tick)


def _stop(number: int, _: FrameType | None) -> None:
    """Ends the worker: at once if it waits for a shard, else once what it has of its shard is removed."""
    if not _is_making or interrupts.received:
        os._exit(128 + number)
    interrupts.note(number)
    raise KeyboardInterrupt


def _make_in_worker(number: int) -> ShardRecord:
    global _is_making
    assert _worker is not None
    preparation, max_bad, tick = _worker
    try:
        try:
            _is_making = True
            return _make_one(preparation, number, max_bad, tick)
        finally:
            _is_making = False
    finally:
        if interrupts.received:  # whatever became of the exception: the pool waits for this end
            os._exit(128 + interrupts.received[0])


def _make_one(preparation: Preparation, number: int, max_bad: int, tick: Callable[[], None]) -> ShardRecord:
    try:
        return preparation.make(number, max_bad=max_bad, tick=tick)
    except TooManyBad as error:
        raise _too_many(error.bad, max_bad) from None


def _too_many(bad: Sequence[tuple[str, str]], max_bad: int) -> UserError:
    named = "; ".join(f"{key}: {reason}" for key, reason in bad[:_BAD_IMAGES_NAMED])
    more = f"; and {len(bad) - _BAD_IMAGES_NAMED} more" if len(bad) > _BAD_IMAGES_NAMED else ""
    return UserError(
        f"at least {len(bad)} images are unusable, --max-bad allows {max_bad} ({named}{more}); repair them, or "
        f"skip them with --max-bad N (the same command continues with the shards that are finished)"
    )
