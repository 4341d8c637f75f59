"""Reads LSUN's LMDB databases: keys are 40 hexadecimal characters, values are WebP files."""

from pathlib import Path
from typing import Any

import lmdb

from cmscale.errors import UserError
from data_prep.sources import ImageSource, SourceKind, file_facts


def open_lsun(path: Path) -> ImageSource:
    """Opens the LMDB in a folder, or in the only `*_lmdb` folder in it."""
    folder = _lmdb_folder(path)
    environment = _open_lmdb(folder)
    try:
        with environment.begin() as transaction:
            keys = [bytes(key).decode("ascii") for key in transaction.cursor().iternext(values=False)]
    except UnicodeDecodeError:
        raise UserError(f"--source lsun:{path}: the keys are not text; this is not an LSUN LMDB") from None
    finally:
        environment.close()
    return ImageSource(f"lsun:{folder}", keys, lambda: _open_lmdb(folder), _read, facts=_facts)


def _read(environment: Any, key: str) -> bytes:
    with environment.begin() as transaction:
        return bytes(transaction.get(key.encode("ascii")))


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
    except lmdb.Error as error:
        raise UserError(f"--source lsun:{folder}: not an LMDB, or a damaged one ({error})") from None
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (folder / "data.mdb").stat().st_size
    if expected > size:  # reading past the end of a mapped file kills the process
        environment.close()
        raise UserError(f"--source lsun:{folder}: data.mdb is truncated ({size} of {expected} bytes); copy it again")
    return environment


KIND = SourceKind("DIR", open_lsun)
