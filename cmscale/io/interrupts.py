"""Notes Ctrl-C, of which only the main thread of a command gets an exception, and ends what other threads wait for."""

import threading
import time
from collections.abc import Callable

LAST_SECONDS = 5.0
"""For so long after Ctrl-C the main thread still asks servers for what leaves nothing half-done behind."""

received: list[int] = []
"""The signals so far, where `cmscale.commands.ending` handles them."""

ending: list[Callable[[], None]] = []
"""What ends the waits of other threads at Ctrl-C: they are called in its handler."""

_until = 0.0


def note(number: int) -> None:
    """Notes a signal, and ends the waits of other threads. The handler of the signal calls it."""
    global _until
    if not received:
        _until = time.monotonic() + LAST_SECONDS
    received.append(number)
    for end in ending:
        end()


def seconds_left() -> float | None:
    """For how long this thread may still wait for a server; None for as long as it likes: there was no Ctrl-C."""
    if not received:
        return None
    return max(0.0, _until - time.monotonic()) if threading.current_thread() is threading.main_thread() else 0.0
