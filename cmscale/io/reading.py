"""Reads what others wrote: whatever a parser raises on a foreign file becomes one line."""

import contextlib
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.pickles import ForbiddenName

_LONGEST_REASON = 200
_OF_TORCH = re.compile(
    r"^Weights only load failed.*(?:source\.|message\.|use case:) (?:WeightsUnpickler error: )?"
    r"(.*?)\.?(?: Please use| Check the documentation|$)"
)
_WRITER_SECONDS = 2.0  # until one that starts together with this process is there


@contextmanager
def reading(origin: object, what: str, *, advice: str = "copy it again, or give another") -> Iterator[None]:
    """Turns what a parser raises on a damaged or hostile file into a UserError.

    Parsers raise whatever their parts raise: zipfile alone BadZipFile, zlib.error, RuntimeError, NotImplementedError,
    EOFError, OverflowError, struct.error and more. So the block must hold the parser and nothing else.

    Args:
        origin: The file, for the message.
        what: What it should have been, for example `an .npz of plain arrays`.

    Raises:
        UserError: anything but a UserError or ConnectionError was raised in the block.
    """
    try:
        yield
    except (UserError, ConnectionError):
        raise
    except ForbiddenName as error:
        raise UserError(f"{origin}: refused, as {error}; {advice}") from None
    except FileNotFoundError:
        raise UserError(f"{origin}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{origin}: is a folder; give a file") from None
    except PermissionError as error:
        raise UserError(f"{origin}: not readable ({error.strerror})") from None
    except MemoryError as error:
        raise UserError(f"{origin}: needs more memory than there is, or is damaged; {advice}") from error
    except Exception as error:
        raise UserError(f"{origin}: damaged, or not {what} ({reason(error)}); {advice}") from error


def reason(error: BaseException) -> str:
    """An exception's message, short, on one line, without what it says about Python.

    Of torch's about a file that is no plain weights only the cause is taken: it goes on to advise trusting the file.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    if found := _OF_TORCH.search(text):
        text = found[1]
    if isinstance(error, KeyError):
        text = f"no {text}"
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"


def why_no_file(path: str | Path, *, absent: str = "no such file") -> str:
    """Why no file can be read at a path: it is a folder, a device or pipe, a dead link, or absent."""
    path = Path(path)
    if path.is_dir():
        return "is a folder; give a file"
    if path.exists():
        return "is no regular file; give a file"
    if path.is_symlink():
        return f"is a link to {path.readlink()}, where nothing is"
    return absent


def read_small(path: str | Path, *, what: str, limit: int = 1 << 24) -> bytes:
    """The bytes of a file, or of a pipe such as `<(git show ...)`, that has no reason to be large: a config.

    Args:
        what: What it is, for messages: `a config`.
        limit: The most bytes that are read; a device such as /dev/zero has no end.

    Raises:
        UserError: there is no such file, it can't be read, it is larger, or a pipe to which nobody writes.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            content = _begun(file.fileno(), path) + file.read(limit + 1)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: {why_no_file(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error}); give {what}") from None
    if len(content) > limit:
        raise UserError(f"{path}: has more than {limit >> 20} MiB, too much for {what}; give another file")
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a pipe, too, before somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _begun(descriptor: int, path: str | Path) -> bytes:
    """What is in a pipe, once somebody writes to it; nothing of other files. Reading waits from then on."""
    begun = b""
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        until = time.monotonic() + _WRITER_SECONDS
        with contextlib.suppress(BlockingIOError):  # a writer is there, and has written nothing yet
            while not (begun := os.read(descriptor, 1 << 16)):
                if time.monotonic() > until:
                    raise UserError(f"{path}: is a pipe that holds nothing, or to which nobody writes; give a file")
                time.sleep(0.05)
    os.set_blocking(descriptor, True)
    return begun


def check_regular(path: Path) -> Path:
    """The path, if a file is there or nothing. Raises UserError for a device or a pipe, which may have no end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is no regular file; give a file")
    return path


def read_regular(path: Path) -> bytes:
    """The bytes of a file, however large. Raises UserError for a device or a pipe."""
    return check_regular(path).read_bytes()


def files_in(folder: Path, pattern: str, unreadable: list[str] | None = None) -> list[Path]:
    """What a folder holds of a pattern, by name; nothing if it is missing, or may not be looked into.

    Args:
        unreadable: Takes a line if it may not.
    """
    problem = ""
    try:
        if os.path.lexists(folder) and not os.access(folder, os.R_OK | os.X_OK):
            problem = "not allowed to look into it"
        else:
            return sorted(folder.glob(pattern))
    except OSError as error:  # a folder above it
        problem = str(error.strerror)
    if unreadable is not None:
        unreadable.append(f"{folder.name}: {problem}")
    return []


def utf8(text: str) -> str:
    """Text that every encoder takes: bytes of a file's name that are not UTF-8 are written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def mended_utf8() -> str:
    """What to do about a path that is not UTF-8: it may be, where Python was told to read it as something else."""
    encoding = sys.getfilesystemencoding()
    return "rename it" if encoding == "utf-8" else f"Python reads it as {encoding}: set PYTHONUTF8=1"
