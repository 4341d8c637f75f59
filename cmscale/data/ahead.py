"""Threads that work ahead of the training: shards into the cache, and the batch that comes next."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from cmscale.data.rank_batches import RankBatches


class Prefetcher:
    """A thread that fetches the shards of the next batches into the cache, in the order in which they are needed."""

    def __init__(self, batches: RankBatches, lookahead: int) -> None:
        self.batches = batches
        self.lookahead = lookahead
        self._cursor = 0
        self._wanted = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
        self._thread.start()

    def move_to(self, cursor: int) -> None:
        """Fetches for the batches from this cursor on; returns at once."""
        self._cursor = cursor
        self._wanted.set()

    def stop(self) -> None:
        """Ends the thread after the shard that it fetches."""
        self._stopped = True
        self._wanted.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        samples = self.batches.samples
        step = self.batches.global_batch_size
        while self._wanted.wait() and not self._stopped:
            self._wanted.clear()
            cursor = self._cursor
            for ahead in range(self.lookahead):
                _, ids, _ = self.batches.ids(cursor + ahead * step)
                for shard in dict.fromkeys(samples.shard_of(int(index)) for index in ids):
                    name = samples.manifest.shards[shard].name
                    if self._stopped:
                        return
                    if not samples.cache.has(name):
                        with contextlib.suppress(Exception):  # the reader gets the same error and reports it
                            samples.cache.path(name)


class Fetch:
    """One batch on its way, in a thread that nobody has to wait for."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._raw: Any = None
        self._error: BaseException | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, name="fetch", daemon=True).start()

    def _run(self) -> None:
        try:
            self._raw = next(self._iterator)
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def result(self) -> Any:
        """The batch; raises what fetching it raised."""
        self.done.wait()
        if self._error is not None:
            raise self._error
        return self._raw
