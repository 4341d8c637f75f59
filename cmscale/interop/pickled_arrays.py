"""Makes numpy arrays of what a pickle says of them: only numbers, only as many as it holds bytes for."""

import math
import re
from typing import Any

import numpy as np

from cmscale.io.pickles import Call, Name, PickleError

_TYPE = re.compile(r"([<>=|]?)(f[248]|[iu][1248]|b1|\?)")
_MAX_DIMENSIONS = 8
_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_RECONSTRUCT = frozenset(f"{core}._reconstruct" for core in _CORES)
_SCALAR = frozenset(f"{core}.scalar" for core in _CORES)
_FROM_BUFFER = frozenset({"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"})
_NO_BYTES = frozenset({"__builtin__.bytes", "builtins.bytes"})  # as protocol 2 writes empty bytes
_NAMES = _NO_BYTES | _RECONSTRUCT | _SCALAR | _FROM_BUFFER | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}


def names_array(name: Name) -> bool:
    """Whether a name belongs to numpy's pickles of arrays and numbers."""
    return str(name) in _NAMES


def array(value: Any) -> np.ndarray:
    """The array or number that a pickle describes.

    Raises:
        PickleError: it is no array of numbers, or not of as many as its shape says.
    """
    match value:
        case bool() | int() | float():
            return _number(value)
        case Call(arguments=(shape, dtype, buffer)) if value.name == "numpy.ndarray":
            return _filled(shape, dtype, buffer)
        case Call() if value.name in _RECONSTRUCT and isinstance(value.state, tuple) and len(value.state) in (4, 5):
            shape, dtype, fortran_order, buffer = value.state[-4:]
            return _filled(shape, dtype, buffer, order="F" if fortran_order is True else "C")
        case Call(arguments=(buffer, dtype, shape, ("C" | "F") as order)) if value.name in _FROM_BUFFER:
            return _filled(shape, dtype, buffer, order=order)
        case Call(arguments=(dtype, buffer)) if value.name in _SCALAR:
            return _filled((), dtype, buffer)
    named = value.name if isinstance(value, Call) else type(value).__name__
    raise PickleError(f"{named[:100]} where an array of numbers is needed")


def _number(value: float) -> np.ndarray:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise PickleError("a number has more than 64 bits")
    return np.asarray(value)


def _filled(shape: Any, dtype: Any, buffer: Any, *, order: Any = "C") -> np.ndarray:
    kind, content = _dtype(dtype), _bytes(buffer)
    is_shape = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not is_shape or len(shape) > _MAX_DIMENSIONS:
        raise PickleError("an array has no valid shape")
    if math.prod(shape) * kind.itemsize != len(content):
        raise PickleError(f"an array of shape {list(shape)}, type {kind}, has {len(content)} bytes")
    return np.frombuffer(content, kind).reshape(shape, order=order).copy(order="K")


def _dtype(value: Any) -> np.dtype:
    code, order = value, ""
    if isinstance(value, Call) and value.name == "numpy.dtype" and value.arguments:
        code = value.arguments[0]
        state = value.state
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            order = state[1]
    found = _TYPE.fullmatch(code) if isinstance(code, str) else None
    if found is None:
        raise PickleError(f"an array holds {str(code)[:50] if isinstance(code, str) else 'objects'}, not numbers")
    return np.dtype((order or found[1]) + found[2])


def _bytes(value: Any) -> bytes:
    """A buffer; pickles of protocol 2 hold it as text in Latin-1."""
    match value:
        case bytes():
            return value
        case str():
            return value.encode("latin-1")
        case Call(arguments=()) if value.name in _NO_BYTES:
            return b""
        case Call(arguments=(str() as text, "latin1" | "latin-1")) if value.name == "_codecs.encode":
            return text.encode("latin-1")
        case _:
            raise PickleError("an array has no bytes")
