"""Decides how commands end: a line for each of a user's mistakes and status 2, 1 for a fault, 130 after Ctrl-C.

It imports next to nothing, so that a command can install `end_early_interrupts` before its slow imports.
"""

import codecs
import contextlib
import errno
import io
import os
import re
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from cmscale.errors import DamagedInput, UserError
from cmscale.io import interrupts

INTERRUPTED = 128 + signal.SIGINT
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")
READER_LEFT = 128 + signal.SIGPIPE
_FAULTS_OF_A_FILE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What no user has mistaken: a full or failing disk, and the system's limits."""


def guarded(
    main: Callable[[list[str]], int | None],
    arguments: Sequence[str] | None = None,
    *,
    label: str = "error",
    interrupted: str = "interrupted",
    faults: tuple[type[Exception], ...] = (),
) -> int:
    """Runs a command and returns its exit status.

    A reader of its output that leaves (`| head`) ends it without a word, as it ends other programs: 141.

    Args:
        main: Takes the arguments; None counts as 0.
        arguments: By default those of the process.
        label: What a line about a user's mistake begins with.
        interrupted: What is printed after Ctrl-C.
        faults: Further exceptions that are a fault of the surroundings: one line, status 1.
    """
    _replace_missing_outputs()
    _let_everything_be_printed(sys.stdout)
    hide_warnings_of_pillow()
    try:
        try:
            return main(list(sys.argv[1:] if arguments is None else arguments)) or 0
        except Exception as error:
            if _came_of_ctrl_c(error):
                raise KeyboardInterrupt from error
            raise
        finally:
            _flush_output()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # how rich leaves where it prints a help
            return READER_LEFT
        raise
    except (UserError, DamagedInput) as error:
        said = "\n".join(f"{label}: {line}" for line in str(error).splitlines() or [""])
        return _said(said, error.status if isinstance(error, UserError) else 2)
    except KeyboardInterrupt:
        return _said(interrupted, INTERRUPTED)
    except (OSError, subprocess.SubprocessError, *faults) as error:
        if isinstance(error, BrokenPipeError) and sum(map(_is_closed, (sys.stdout, sys.stderr))):
            return READER_LEFT
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, ConnectionError):
            status = 1 if error.errno in _FAULTS_OF_A_FILE else 2
            return _said(f"{label}: {os.fsdecode(error.filename)}: {error.strerror}", status)
        known = isinstance(error, (ConnectionError, *faults)) and not isinstance(error, BrokenPipeError)
        said = " ".join(str(error).split())
        return _said(f"{label}: {said}" if known else f"fault: {type(error).__name__}: {said}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):  # torch's is one
            raise
        said = " ".join(str(error)[:300].split()) or type(error).__name__
        return _said(f"fault: not enough memory for this ({said})", 1)


def _flush_output() -> None:
    """Writes out what was printed. Raises OSError that names the output if there is no room for it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop(sys.stdout)
        raise OSError(error.errno, error.strerror, "standard output") from error


def _replace_missing_outputs() -> None:
    """Has what is printed go nowhere if the process was started without outputs (`>&-`), where Python has None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (for the rest of the process)


def hide_warnings_of_pillow() -> None:
    """Hides what Pillow says of pictures that are too large, which are refused, and of damaged EXIF data.

    For processes of commands alone: a program that uses `cmscale.load` has filters of its own.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _let_everything_be_printed(stream: TextIO | None) -> None:
    """Has a stream write out what its encoding lacks, where Python would raise an exception; stderr does by itself.

    In UTF-8 names of files that are not UTF-8 go out as they are.
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
        stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def end_early_interrupts() -> None:
    """Ends the process with one line if Ctrl-C comes while modules are imported. Call it first in a script."""
    sys.excepthook = _on_exception
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    """Does as Python does on Ctrl-C, and notes it: a library may swallow the exception and fail of what it left."""
    interrupts.note(number)
    raise KeyboardInterrupt


def leave(status: int) -> NoReturn:
    """Ends the process. After Ctrl-C that may take a moment: a second one ends it at once, without a traceback."""
    if status == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # If it came while a text was executed, as dataclasses do when a module is imported, Python holds it for
        # unhandled, and would end the process by the signal. The next text that is executed clears that.
        exec("")
    sys.exit(status)


def _on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) or interrupts.received:
        os._exit(_said("interrupted", INTERRUPTED))
    sys.__excepthook__(kind, error, trace)


def _came_of_ctrl_c(error: BaseException | None) -> bool:
    """Whether an exception came of Ctrl-C: some libraries turn it into one of their own while they are imported."""
    if interrupts.received:
        return True
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _said(lines: str, status: int) -> int:
    """Prints lines on stderr, which may be closed too. Returns the status."""
    with contextlib.suppress(OSError):
        for line in lines.splitlines() if sys.stderr is not None else ():
            print(" ".join(line.split()), file=sys.stderr, flush=True)
    return status


def _is_closed(stream: TextIO | None) -> bool:
    """Whether nobody reads an output any more. Then what is left of it goes nowhere, without a message at exit."""
    if stream is None:
        return False
    with contextlib.suppress(OSError, ValueError):  # it may be no file
        number = stream.fileno()
        poll = select.poll()
        poll.register(number, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            _drop(stream)
            return True
    return False


def _drop(stream: TextIO) -> None:
    """Has what is left of an output go nowhere: at exit Python would try to write it again, and end with 120."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
