"""Owns where images come from: LSUN LMDBs, folders, zip files, tars; each a sorted list of keys and a way to
read one."""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmscale.data.formats.webdataset import member_key
from cmscale.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LONGEST_KEY = 90  # what a ustar header surely holds, with an extension


@dataclass(frozen=True)
class Source:
    """Images by key.

    Attributes:
        name: `kind:PATH` with the path absolute, as recorded in the data set.
        keys: Sorted; the data set's order.
        open: Opens what `read` needs, once a process: handles don't survive a fork.
        read: (handle, key) -> encoded bytes.
    """

    name: str
    keys: list[str]
    open: Callable[[], Any]
    read: Callable[[Any, str], bytes]

    def digest(self) -> str:
        """SHA-256 of the keys: whether it is the same source."""
        return hashlib.sha256("\n".join(self.keys).encode("utf-8", "surrogateescape")).hexdigest()


class Reader:
    """Reads a source in this process; opens it on first use. Close it: LMDB opens a folder but once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._handle: tuple[int, Any] | None = None

    def __call__(self, key: str) -> bytes:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self.source.open())
        return self.source.read(self._handle[1], key)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle and handle[0] == os.getpid() and hasattr(handle[1], "close"):
            handle[1].close()


def sample_key(key: str) -> str:
    """The key that a sample keeps; one too long for a tar header becomes its SHA-1."""
    if len(member_key(key)) <= _LONGEST_KEY:
        return key
    return hashlib.sha1(key.encode("utf-8", "surrogateescape")).hexdigest()


def open_source(text: str) -> Source:
    """Opens `lsun:DIR`, `folder:DIR`, `zip:FILE` or `tars:DIR`.

    Raises:
        UserError: another kind, nothing there, not what it should be, or without images.
    """
    kind, colon, place = text.partition(":")
    openers = {"lsun": _lsun, "folder": _folder, "zip": _zip, "tars": _tars}
    if not colon or kind not in openers or not place:
        raise UserError(f"--source {text!r}: write lsun:DIR, folder:DIR, zip:FILE or tars:DIR")
    path = Path(place).expanduser().absolute()
    if not path.exists():
        what = "no such LMDB" if kind == "lsun" else "nothing there"
        raise UserError(f"--source {text}: {what} ({path} does not exist)")
    try:
        source = openers[kind](path)
    except PermissionError as error:
        raise UserError(f"--source {text}: can't be read ({error.strerror}: {error.filename})") from None
    if not source.keys:
        raise UserError(f"--source {text}: holds no images")
    return source


def _lsun(path: Path) -> Source:
    folder = _lmdb_folder(path)
    environment = _open_lmdb(folder)
    try:
        with environment.begin() as transaction:
            keys = [bytes(key).decode("ascii") for key in transaction.cursor().iternext(values=False)]
    except UnicodeDecodeError:
        raise UserError(f"--source lsun:{path}: keys are not text; not an LSUN LMDB") from None
    finally:
        environment.close()

    def read(handle: Any, key: str) -> bytes:
        with handle.begin() as transaction:
            return bytes(transaction.get(key.encode("ascii")))

    return Source(f"lsun:{folder}", keys, lambda: _open_lmdb(folder), read)


def _lmdb_folder(path: Path) -> Path:
    """The folder with data.mdb: the path itself, or the only `*_lmdb` in it."""
    if path.is_dir() and (path / "data.mdb").is_file():
        return path
    inner = sorted(found.parent for found in path.glob("*_lmdb/data.mdb")) if path.is_dir() else []
    if len(inner) == 1:
        return inner[0]
    if inner:
        raise UserError(f"--source lsun:{path}: holds {len(inner)} LMDBs; name one: {', '.join(p.name for p in inner)}")
    raise UserError(f"--source lsun:{path}: not an LMDB (no data.mdb in it, nor in a *_lmdb folder of it)")


def _open_lmdb(folder: Path) -> Any:
    import lmdb

    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise UserError(f"--source lsun:{folder}: not an LMDB, or a damaged one ({error})") from None
    claimed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (folder / "data.mdb").stat().st_size
    if claimed > size:  # reading past the end of a mapped file kills the process
        environment.close()
        raise UserError(f"--source lsun:{folder}: data.mdb is truncated ({size} of {claimed} bytes); copy it again")
    return environment


def _folder(path: Path) -> Source:
    if not path.is_dir():
        raise UserError(f"--source folder:{path}: is no folder")
    keys = sorted(
        found.relative_to(path).as_posix()
        for found in path.rglob("*")
        if found.suffix.lower() in SUFFIXES and found.is_file()
    )
    return Source(f"folder:{path}", keys, lambda: path, lambda root, key: (root / key).read_bytes())


def _zip(path: Path) -> Source:
    def open_zip() -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(path)
        except (zipfile.BadZipFile, IsADirectoryError) as error:
            raise UserError(f"--source zip:{path}: not a zip file ({error})") from None

    with open_zip() as archive:
        keys = sorted({name for name in archive.namelist() if name.lower().endswith(SUFFIXES)})
    return Source(f"zip:{path}", keys, open_zip, lambda archive, key: archive.read(key))


def _tars(path: Path) -> Source:
    """Images in `*.tar` files, found once; a key is TAR/MEMBER."""
    places: dict[str, tuple[Path, int, int]] = {}
    for tar in sorted(path.glob("*.tar")):
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    if member.isreg() and member.name.lower().endswith(SUFFIXES):
                        places[f"{tar.stem}/{member.name}"] = (tar, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"--source tars:{path}: {tar.name} is not a tar, or a damaged one ({error})") from None

    def read(table: dict[str, tuple[Path, int, int]], key: str) -> bytes:
        tar, offset, size = table[key]
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return Source(f"tars:{path}", sorted(places), lambda: places, read)
