"""Says and writes what a job can do without, so that a disk which is full for a while does not end it for that."""

from collections.abc import Iterator
from contextlib import contextmanager

from cmscale.errors import UserError


def say(line: str) -> None:
    """Prints a line at once. A log on a full disk gets what still fits, and the rest with a later line."""
    try:
        print(line, flush=True)
    except BrokenPipeError:  # whoever started the process reads no more of it
        raise
    except OSError:
        pass


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Lets a block fail whose files or events are not needed for the work to go on, and says so."""
    try:
        yield
    except (OSError, UserError) as error:
        say(f"{what} is not written: {error}")
