"""Reads files of `torch.save` without executing anything in them: tensors are described first, then loaded one by one.

Two layouts exist: a zip archive with `data.pkl` and one member per storage (torch 1.6 and later), and a sequence of
pickles followed by the storages. The second is also how a storage is stored inside an ordinary pickle.
"""

import io
import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cmscale.errors import UserError
from cmscale.interop.strict import without_wrappers
from cmscale.io.pickles import Call, Name, Persistent, PickleError, plain, read_pickle
from cmscale.io.reading import check_regular, reading

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TENSORS = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"})
_PARAMETER = "torch._utils._rebuild_parameter"
_FROM_BYTES = "torch.storage._load_from_bytes"
_NAMES = _TENSORS | {_PARAMETER, _FROM_BYTES, "torch.Size", "collections.OrderedDict"}

Load = Callable[[str, int], bytearray]
"""(key of a storage, its bytes) -> its content."""


def names_tensor(name: Name) -> bool:
    """Whether a name belongs to torch's pickles of tensors and of dicts of them."""
    return str(name) in _NAMES or (name.module == "torch" and name.name in _DTYPES)


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor in a file: described, not loaded.

    Attributes:
        numel: Elements of its storage.
        offset, strides: Where its elements lie in the storage, in elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    offset: int
    strides: tuple[int, ...]
    storage: Callable[[], bytearray] = field(repr=False)

    def load(self) -> torch.Tensor:
        """The tensor, on the CPU.

        Raises:
            PickleError: its storage is missing, or has another size.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(self.storage(), dtype=self.dtype, count=self.numel)
        return flat.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class TorchFile:
    """The content of a file: its value, as `read_pickle` returns it, and access to its tensors."""

    value: Any
    load: Load = field(repr=False)

    def tensor(self, value: Any) -> StoredTensor | None:
        """The tensor that a part of the value describes; None if it describes none.

        Raises:
            PickleError: the description contradicts itself.
        """
        if not isinstance(value, Call):
            return None
        if value.name == _PARAMETER and value.arguments:
            return self.tensor(value.arguments[0])
        if value.name not in _TENSORS or len(value.arguments) < 4:
            return None
        storage, offset, shape, strides = value.arguments[:4]
        dtype, numel, load = self._storage(storage)
        shape, strides = _sizes(shape), _sizes(strides)
        last = sum((side - 1) * stride for side, stride in zip(shape, strides, strict=False)) if 0 not in shape else -1
        fits = len(shape) == len(strides) and type(offset) is int and offset >= 0 and offset + last < numel
        if not fits or math.prod(shape) > numel:
            raise PickleError(f"a tensor of shape {list(shape)[:8]} does not fit its storage of {numel} elements")
        return StoredTensor(shape, dtype, numel, offset, strides, load)

    def _storage(self, value: Any) -> tuple[torch.dtype, int, Callable[[], bytearray]]:
        """Type, number of elements and content of a storage."""
        if isinstance(value, Call) and value.name == _FROM_BYTES:
            content = value.arguments[0] if value.arguments else None
            if not isinstance(content, bytes):
                raise PickleError("a storage has no bytes")
            inner = read_sequence(io.BytesIO(content), size=len(content))
            if not isinstance(inner.value, Persistent):
                raise PickleError("a storage holds something else")
            return inner._storage(inner.value)
        match value:
            case Persistent(("storage", Name("torch", kind), str() as key, str(), int() as numel, *_)):
                if kind in _DTYPES and numel >= 0:
                    dtype = _DTYPES[kind]
                    return dtype, numel, lambda: self.load(key, numel * dtype.itemsize)
        raise PickleError("a tensor has a storage of an unknown kind")


def read_state_dict(path: Path, shapes: Mapping[str, Collection[tuple[int, ...]]], *, origin: str) -> dict[str, Any]:
    """The state dict in a file. A tensor that has none of its shapes has no values: it is refused by its shape.

    Args:
        shapes: The shapes that the tensor of each name may have. Tensors of other names have no values either.
        origin: The file, for messages.

    Raises:
        UserError: the file is damaged, or holds anything but a state dict.
    """
    with reading(origin, "a state dict written by torch.save"), open_torch(path, allows=names_tensor) as file:
        state = plain(file.value)
        if not isinstance(state, dict):
            named = state.name if isinstance(state, Call) else type(state).__name__
            raise UserError(f"{origin}: holds {named}; give a state dict of tensors")
        found: dict[str, Any] = {}
        for name, value in without_wrappers(state).items():
            tensor = file.tensor(value)
            if tensor is None:
                found[str(name)] = value
            elif tensor.shape in shapes.get(name, ()):
                found[name] = tensor.load()
            else:
                found[str(name)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return found


@contextmanager
def open_torch(path: Path, *, allows: Callable[[Name], bool]) -> Iterator[TorchFile]:
    """Opens a file of `torch.save` in either layout; its tensors can be loaded inside the block.

    Args:
        allows: Whether a name may occur in it.

    Raises:
        PickleError: it is damaged, names what is not allowed, or was written by something else.
        Exception: what `zipfile` raises on a damaged archive.
    """
    with check_regular(path).open("rb") as file:
        size = path.stat().st_size
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                yield _from_archive(archive, allows)
            return
        file.seek(0)
        yield read_sequence(file, size=size, allows=allows)


def _from_archive(archive: zipfile.ZipFile, allows: Callable[[Name], bool]) -> TorchFile:
    members = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise PickleError("the archive holds no data.pkl")
    (root,) = roots
    order = members.get(f"{root}byteorder")
    if order is not None and _content(archive, order, limit=100).strip() != b"little":
        raise PickleError("its numbers are in big-endian order")
    content = _content(archive, members[f"{root}data.pkl"], limit=1 << 28)
    value = read_pickle(io.BytesIO(content), size=len(content), allows=allows)

    @lru_cache(maxsize=2)  # tensors that share a storage follow each other
    def load(key: str, size: int) -> bytearray:
        info = members.get(f"{root}data/{key}")
        if info is None or info.file_size != size:
            raise PickleError(f"storage {key[:40]} is missing, or has not the {size} bytes that its tensors need")
        return bytearray(_content(archive, info, limit=size))

    return TorchFile(value, load)


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, *, limit: int) -> bytes:
    """A member's bytes. torch does not compress: a small file can't claim to hold a large one."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise PickleError(f"member {info.filename[:80]} is compressed, or too large")
    return archive.read(info)


def read_sequence(file: BinaryIO, *, size: int, allows: Callable[[Name], bool] = names_tensor) -> TorchFile:
    """Reads the older layout: pickles of a magic number, a version, facts, the value and the keys; then the storages.

    The file must stay open while tensors are loaded.

    Raises:
        PickleError: it is damaged, names what is not allowed, or was written by something else.
    """
    magic = read_pickle(file, size=size, allows=allows)
    if magic != _MAGIC:
        raise PickleError("it was not written by torch.save")
    read_pickle(file, size=size, allows=allows)  # the layout's version, 1001 ever since
    facts = read_pickle(file, size=size, allows=allows)
    if not isinstance(facts, Mapping) or facts.get("little_endian") is not True:
        raise PickleError("its numbers are in big-endian order")
    value = read_pickle(file, size=size, allows=allows)
    keys = read_pickle(file, size=size, allows=allows)
    if not isinstance(keys, list):
        raise PickleError("it lists no storages")
    found = dict(_storages(value, keys))
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        numel = int.from_bytes(file.read(8), "little")
        length = numel * found.get(key, 0)
        if key not in found or file.tell() + length > size:
            raise PickleError(f"storage {str(key)[:40]} is cut off")
        places[key] = (file.tell(), length)
        file.seek(length, io.SEEK_CUR)

    def load(key: str, wanted: int) -> bytearray:
        at, length = places.get(key, (0, -1))
        if length != wanted:
            raise PickleError(f"storage {key[:40]} is missing, or has not the {wanted} bytes that its tensors need")
        content = bytearray(length)
        file.seek(at)
        if file.readinto(content) != length:  # pyright: ignore[reportAttributeAccessIssue]
            raise PickleError(f"storage {key[:40]} is cut off")
        return content

    return TorchFile(value, load)


def _storages(value: Any, keys: list[Any]) -> Iterator[tuple[str, int]]:
    """The bytes per element of each storage that a value refers to, by key."""
    wanted, waiting, seen = set(map(str, keys)), [value], set()
    while waiting:
        one = waiting.pop()
        match one:
            case Persistent(("storage", Name("torch", kind), str() as key, *_)) if kind in _DTYPES and key in wanted:
                yield key, _DTYPES[kind].itemsize
            case dict() | list() | tuple() | Call():
                if id(one) in seen:
                    continue
                seen.add(id(one))
                waiting.extend(_parts(one))


def _parts(value: Any) -> list[Any]:
    match value:
        case dict():
            return list(value.values())
        case Call():
            return [*value.arguments, value.state, *value.items.values()]
        case _:
            return list(value)


def _sizes(value: Any) -> tuple[int, ...]:
    """A shape or strides: whole numbers that are not negative."""
    if isinstance(value, Call) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or not all(type(side) is int and 0 <= side < 2**48 for side in value):
        raise PickleError("a tensor has no valid shape")
    return tuple(value)
