"""A third kind of storage, in this process's memory: what a new one needs is this module and a line in SCHEMES."""

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from cmscale.io.durable import replace_durably
from cmscale.io.protocol import Entry

_objects: dict[str, bytes] = {}


class MemoryStorage:
    """Objects of `memory://NAME/PREFIX`. It has no local paths."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.url = f"memory://{prefix}"

    @classmethod
    def from_url(cls, url: str) -> "MemoryStorage":
        return cls(url.removeprefix("memory://").strip("/"))

    def join(self, key: str) -> str:
        return f"{self.url}/{key}"

    def read(self, key: str) -> bytes:
        try:
            return _objects[self.join(key)]
        except KeyError:
            raise FileNotFoundError(self.join(key)) from None

    def read_if_present(self, key: str) -> bytes | None:
        return _objects.get(self.join(key))

    def write(self, key: str, data: bytes) -> None:
        _objects[self.join(key)] = data

    def write_if_absent(self, key: str, data: bytes) -> bool:
        return _objects.setdefault(self.join(key), data) == data

    def upload(self, key: str, path: Path) -> None:
        self.write(key, path.read_bytes())

    def download(self, key: str, path: Path) -> None:
        replace_durably(path, self.read(key))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for url in sorted(_objects):
            if url.startswith(self.join(prefix)):
                data = _objects[url]
                yield Entry(url.removeprefix(self.join("")), len(data), sha256(data).hexdigest())

    def folders(self, prefix: str = "") -> "list[str]":
        keys = (entry.key.partition("/") for entry in self.list(prefix))
        return sorted({name for name, slash, _ in keys if slash})

    def delete(self, key: str) -> None:
        _objects.pop(self.join(key), None)

    def delete_all(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    def sub(self, prefix: str) -> "MemoryStorage":
        return MemoryStorage(f"{self.prefix}/{prefix}".strip("/"))

    def local_path(self, key: str) -> None:
        del key

    def check_writable(self, key: str) -> None:
        """Any key can be written."""

    def abort_uploads(self, is_mine: Callable[[str], bool]) -> int:
        return 0


def clear() -> None:
    _objects.clear()
