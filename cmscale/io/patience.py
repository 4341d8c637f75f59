"""Waits for storage that does not answer: the one policy of all storages, and who else may know of a wait.

A storage that is restarted, overloaded or cut off is asked again with growing pauses, for as long as
`storage.patience_minutes` says. Forked processes share the record of a wait: a rank knows what its data workers wait
for.
"""

import mmap
import secrets
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from cmscale.io import interrupts
from cmscale.io.protocol import StorageAway
from cmscale.io.settings import storage_settings

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
FEWEST_ATTEMPTS = 10
"""A patience of a few minutes has shorter pauses: a storage that comes and goes is met while it is there."""
LONGEST_ATTEMPT_SECONDS = 240.0
"""A storage's own attempt, with what its client repeats at once, ends within this time."""

_FIRST_REPORT_SECONDS = 30.0  # after the line that says that a wait has begun; then twice as long each time
_record = struct.Struct(
    "ddd"
)  # until when a process may be waiting, when the next line is due, how long the last lasted
_shared = mmap.mmap(-1, _record.size)


class GivenUp(Exception):
    """Raised in the threads of a transfer of which another part has failed, or which was interrupted."""


def patiently(call: Callable[[], T], *, given_up: threading.Event | None = None) -> T:
    """Calls until the storage answers.

    The pauses double from half a second to half a minute, or to a tenth of a short patience; a random part of up to a
    half of each keeps many ranks from asking at once. What is waited for is said on stderr at growing intervals.

    Args:
        given_up: Ends the waiting of a thread, to which no Ctrl-C comes; that of a command ends it, too.

    Raises:
        StorageAway: it has not answered for `storage.patience_minutes`; the message says so.
        GivenUp: in a thread, after Ctrl-C, or as `given_up` is set.
        Exception: whatever else `call` raises, at once.
    """
    began: float | None = None
    pauses = 0
    while True:
        if threading.current_thread() is not threading.main_thread() and (
            interrupts.received or (given_up is not None and given_up.is_set())
        ):
            raise GivenUp
        try:
            found = call()
        except StorageAway as error:
            now = time.monotonic()
            began = now if began is None else began
            patience = 60.0 * storage_settings().patience_minutes
            left = began + patience - now
            if left <= 0 or interrupts.received:
                _mark(0.0)
                if not patience or interrupts.received:
                    raise
                waited = f"{error}; waited {patience / 60:g} minutes (storage.patience_minutes)"
                raise StorageAway(waited) from error
            _mark(now + LONGEST_PAUSE_SECONDS + LONGEST_ATTEMPT_SECONDS)
            _report(error, now=now, waited=now - began, patience=patience)
            _pause(min(left, pause_seconds(pauses, patience=patience)), given_up)
            pauses += 1
        else:
            if began is not None:
                _answered(time.monotonic() - began)
            return found


def _pause(seconds: float, given_up: threading.Event | None) -> None:
    if threading.current_thread() is threading.main_thread():  # Ctrl-C ends it
        time.sleep(seconds)
        return
    given_up = given_up or threading.Event()
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not interrupts.received and not given_up.wait(min(left, 0.5)):
        pass


def pause_seconds(number: int, *, patience: float) -> float:
    """The pause after the failed attempt `number`, counted from 0: between a half and the whole of its length."""
    longest = min(LONGEST_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, patience / FEWEST_ATTEMPTS))
    length = min(longest, FIRST_PAUSE_SECONDS * 2.0 ** min(number, 30))
    return length * (0.5 + secrets.randbelow(1001) / 2000)


def is_waiting() -> bool:
    """Whether this process, or one that was forked from it, waits for storage that does not answer."""
    return time.monotonic() < _record.unpack(_shared[:])[0]


def forget_waits() -> None:
    """Forgets waits that ended with the process that waited."""
    _shared[:] = bytes(_record.size)


def patience_seconds() -> float:
    """How long this process waits for storage."""
    return 60.0 * storage_settings().patience_minutes


def _mark(until: float) -> None:
    _, due, interval = _record.unpack(_shared[:])
    _shared[:] = _record.pack(until, due, interval)


def _report(error: StorageAway, *, now: float, waited: float, patience: float) -> None:
    """Says what is waited for, unless another process of this family has just said so."""
    until, due, interval = _record.unpack(_shared[:])
    if due and now < due:
        return
    interval = 2 * interval if due else _FIRST_REPORT_SECONDS
    _shared[:] = _record.pack(until, now + interval, interval)
    _say(f"waiting for storage, {waited:.0f} s of at most {patience:.0f} s: {error}")


def _answered(waited: float) -> None:
    _, due, _ = _record.unpack(_shared[:])
    _shared[:] = _record.pack(0.0, 0.0, 0.0)
    if due:
        _say(f"storage answers again, after {waited:.0f} s")


def _say(line: str) -> None:
    try:
        print(" ".join(line.split()), file=sys.stderr, flush=True)
    except OSError:  # a full disk or a closed terminal must not end the wait
        return
