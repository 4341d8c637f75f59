"""Reads LSUN's LMDB databases: keys are 40 hexadecimal characters, values are WebP files."""

import contextlib
import faulthandler
import os
import signal
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import lmdb

from cmscale.data.decode import BadImage
from cmscale.errors import UserError
from data_prep.sources import ImageSource, SourceKind, file_facts

_MOST_PROBED = 8192
"""Images that are read before any work; of LSUN's three million bedrooms one of 371."""


def open_lsun(path: Path) -> ImageSource:
    """Opens the LMDB in a folder, or in the only `*_lmdb` folder in it."""
    folder = _lmdb_folder(path)
    signal_name = _killed_by(lambda: _probe(folder))
    if signal_name is not None:
        raise UserError(
            f"--source lsun:{folder}: data.mdb is damaged (reading it ends by {signal_name}); copy it again"
        )
    keys = _list_keys(folder)
    return ImageSource(f"lsun:{folder}", keys, lambda: _open_lmdb(folder), _read, facts=_facts)


def _list_keys(folder: Path) -> list[str]:
    """All keys, ascending."""
    environment = _open_lmdb(folder)
    where = f"--source lsun:{folder}"
    try:
        entries = environment.stat()["entries"]
        with environment.begin() as transaction:
            found = [bytes(key) for key in islice(transaction.cursor().iternext(values=False), entries + 1)]
        if len(found) != entries or any(first >= second for first, second in pairwise(found)):
            raise UserError(f"{where}: data.mdb is damaged: it does not hold {entries} keys in order; copy it again")
        return [key.decode("ascii") for key in found]
    except UnicodeDecodeError:
        raise UserError(f"{where}: the keys are not text; this is not an LSUN LMDB") from None
    except (lmdb.Error, MemoryError, OverflowError, ValueError) as error:
        raise UserError(f"{where}: data.mdb is damaged ({error}); copy it again") from None
    finally:
        environment.close()


def _probe(folder: Path) -> None:
    """Reads all keys, and the last byte of some images, evenly chosen; a worker's death tells of the others."""
    keys = _list_keys(folder)
    environment = _open_lmdb(folder)
    with environment.begin(buffers=True) as transaction:
        for key in keys[:: -(-len(keys) // _MOST_PROBED) or 1]:
            value = transaction.get(key.encode("ascii"))
            value[-1:].tobytes()


def _killed_by(work: Callable[[], object]) -> str | None:
    """The signal that ends a process which does the work: LMDB follows the page numbers of a damaged file."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):  # the caller meets the same error
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # failed assertions are printed
            work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None


def _read(environment: Any, key: str) -> bytes:
    with environment.begin() as transaction:
        found = transaction.get(key.encode("ascii"))
    if found is None:
        raise BadImage("its key is not there any more")
    return bytes(found)


def _facts(environment: Any, key: str) -> str:
    with environment.begin(buffers=True) as transaction:
        size = len(transaction.get(key.encode("ascii")))
    return f"{size} bytes in {file_facts(Path(environment.path()) / 'data.mdb')}"


def _lmdb_folder(path: Path) -> Path:
    if path.is_dir() and (path / "data.mdb").is_file():
        return path
    inner = sorted(found.parent for found in path.glob("*_lmdb/data.mdb")) if path.is_dir() else []
    if len(inner) == 1:
        return inner[0]
    if inner:
        names = ", ".join(folder.name for folder in inner)
        raise UserError(f"--source lsun:{path}: contains {len(inner)} LMDBs; name one of them: {names}")
    raise UserError(f"--source lsun:{path}: not an LMDB (no data.mdb in it or in a *_lmdb folder in it)")


def _open_lmdb(folder: Path) -> Any:
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = (folder / "data.mdb").stat().st_size
    except (lmdb.Error, OSError, MemoryError, OverflowError) as error:
        raise UserError(f"--source lsun:{folder}: not an LMDB, or a damaged one ({error})") from None
    if expected > size:  # reading past the end of a mapped file kills the process
        environment.close()
        raise UserError(f"--source lsun:{folder}: data.mdb is truncated ({size} of {expected} bytes); copy it again")
    return environment


KIND = SourceKind("DIR", open_lsun)
