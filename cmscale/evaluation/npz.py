"""Reads arrays of an `.npz`: whole, or row by row with one row in memory."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cmscale.errors import UserError


def npz_names(path: Path) -> frozenset[str]:
    """The names of the arrays. Raises UserError if it is no `.npz`."""
    with _archive(path) as archive:
        return frozenset(name.removesuffix(".npy") for name in archive.namelist())


def npz_arrays(path: Path, names: frozenset[str]) -> dict[str, np.ndarray]:
    """Arrays by name. Raises UserError if one is missing or holds Python objects, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({error})") from None


def npz_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, which is not read. Raises UserError if there is no such array."""
    with _member(path, name) as file:
        return _header(file, path)


def npz_rows(path: Path, name: str) -> Iterator[np.ndarray]:
    """The rows of an array, compressed or not. Raises UserError if there is no such array, or it is truncated."""
    with _member(path, name) as file:
        shape, dtype = _header(file, path)
        size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        for _ in range(shape[0]):
            row = file.read(size)
            if len(row) != size:
                raise UserError(f"{path}: {name} is truncated; write the file again")
            yield np.frombuffer(row, dtype).reshape(shape[1:]).copy()


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not an .npz file ({error})") from None


def _member(path: Path, name: str) -> Any:
    archive = _archive(path)
    try:
        return archive.open(f"{name}.npy")  # keeps the archive's file open
    except KeyError:
        raise UserError(f"{path}: holds no {name}") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not an .npz file ({error})") from None


def _header(file: Any, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if fortran_order or dtype.hasobject:
        raise UserError(f"{path}: holds Python objects or an array in Fortran order; write plain arrays in C order")
    return shape, dtype
