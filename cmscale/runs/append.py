"""Appends records to files of JSON lines that several processes write.

Imports the standard library only: `cmscale/engine/watch.py` loads this file by its path.
"""

import errno
import json
import os
from typing import Any


def append(path: str | os.PathLike[str], record: dict[str, Any], *, durable: bool) -> None:
    """Appends a record as one line, in one write, so that lines of several processes never mix.

    A last line that a crash cut short is ended first: its record is lost, this one is not.

    Args:
        durable: Returns only when the line is on the disk.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    line = (json.dumps(record, allow_nan=True) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)  # less the umask
    try:
        size = os.fstat(descriptor).st_size
        if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
