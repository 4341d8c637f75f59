"""Says and writes what a job can do without, so that a disk which is full for a while does not end it for that."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from cmscale.errors import UserError


def say(text: str, *, to: Literal["stdout", "stderr"] = "stdout", end: str = "\n") -> OSError | None:
    """Prints at once. A log on a full disk gets what still fits, and the rest with a later line.

    Returns:
        Why not all of it is written.

    Raises:
        BrokenPipeError: whoever started the process reads no more of it.
    """
    try:
        print(text, end=end, file=getattr(sys, to), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        return error
    return None


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Lets a block fail whose files or events are not needed for the work to go on, and says so."""
    try:
        yield
    except (OSError, UserError) as error:
        say(f"{what} is not written: {error}")
