"""Opens storages by URL. A further kind is one module that implements `Storage`, and a line in `SCHEMES`."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.local import LocalStorage
from cmscale.io.protocol import Entry, Storage
from cmscale.io.reading import mended_utf8, utf8
from cmscale.io.s3 import S3Storage

SCHEMES: dict[str, Callable[[str], Storage]] = {"file": LocalStorage.from_url, "s3": S3Storage.from_url}

_IN_ONE_ANSWER = 1000  # objects, of S3
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def open_storage(url: str | Path) -> Storage:
    """Opens a URL such as `s3://bucket/prefix`, or a local folder (which need not exist yet). Reads nothing.

    Raises:
        UserError: the scheme is unknown, or the URL incomplete.
    """
    text = str(url)
    if text != utf8(text):
        raise UserError(f"{utf8(text)}: the path is not UTF-8, which documents could not name; {mended_utf8()}")
    found = _SCHEME.match(text)
    if found is None:
        return LocalStorage(Path(text))
    if found[1] not in SCHEMES or not text.startswith(f"{found[1]}://"):
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"{text}: not a URL that can be opened; give a local path, or one of {known}")
    return SCHEMES[found[1]](text)


def open_parent(url: str | Path) -> tuple[Storage, str]:
    """The storage that holds the single object at `url`, and the object's key in it.

    Raises:
        UserError: the URL names no object, or has an unknown scheme.
    """
    head, _, name = str(url).rstrip("/").rpartition("/")
    if not name or re.fullmatch(rf"{_SCHEME.pattern}/?", head):
        raise UserError(f"{url}: names no file")
    return open_storage(head or ("/" if str(url).startswith("/") else ".")), name


def stored_entry(storage: Storage, key: str) -> Entry | None:
    """What a storage lists of one object; None if it is not there.

    One answer is enough: of the keys that begin with it, an object's own comes first, or, at stores with an order of
    their own, soon.
    """
    return next((entry for entry in islice(storage.list(key), _IN_ONE_ANSWER) if entry.key == key), None)


def has_object(storage: Storage, key: str) -> bool:
    """Whether an object is there, without a walk through all others."""
    path = storage.local_path(key)
    return path.is_file() if path is not None else stored_entry(storage, key) is not None


@contextmanager
def local_copy(storage: Storage, key: str) -> Iterator[Path]:
    """A stored file as a local path: itself, or a copy that is removed afterwards. Raises FileNotFoundError."""
    path = storage.local_path(key)
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(storage.join(key))
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="cmscale-") as folder:
        copy = Path(folder) / "copy"
        storage.download(key, copy)
        yield copy
