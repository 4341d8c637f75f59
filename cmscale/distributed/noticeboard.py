"""Passes small notes from the ranks to rank 0 without a collective, so that a thread can send them beside training."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from cmscale.distributed.compat import default_store

_OF_THIS_PROCESS: Any = dist.HashStore()
"""Where there is no process group: ranks that one process plays, or the only rank."""


class NoticeBoard:
    """Notes by topic and rank, in the store by which the ranks met, which is in rank 0's memory.

    A file per rank would cost rank 0 two operations of the shared file system per rank, and on NFS the wait until a
    cached absence expires.

    Args:
        store: Another store of torch.distributed.
    """

    def __init__(self, store: Any = None) -> None:
        self._store = store or (default_store() if dist.is_initialized() else _OF_THIS_PROCESS)

    def post(self, topic: str, rank: int, note: str) -> None:
        """Leaves a rank's note; one per rank and topic."""
        self._store.set(f"{topic}/{rank}", note)
        self._store.add(f"{topic}/count", 1)

    def count(self, topic: str) -> int:
        """How many notes there are."""
        return int(self._store.add(f"{topic}/count", 0))

    def fail(self, topic: str, why: str) -> None:
        """Says why there will not be a note of every rank."""
        self._store.set(f"{topic}/failed", why)

    def failure(self, topic: str) -> str | None:
        """What a rank passed to `fail`; None if none did."""
        key = f"{topic}/failed"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def missing(self, topic: str, ranks: Sequence[int]) -> list[int]:
        """The ranks of which there is no note."""
        return [rank for rank in ranks if not self._store.check([f"{topic}/{rank}"])]

    def take(self, topic: str, num_ranks: int) -> list[str]:
        """Every rank's note, which must be there, by rank; they are removed."""
        keys = [f"{topic}/{rank}" for rank in range(num_ranks)]
        found = [note.decode() for note in map(self._store.get, keys)]
        for key in (*keys, f"{topic}/count"):
            self._store.delete_key(key)
        return found
