"""Reads arrays of an `.npz`: whole, or row by row with one row in memory. Nothing in a file is trusted.

A header states shape and type: it is checked against the bytes that the archive holds before anything is allocated.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cmscale.errors import UserError
from cmscale.io.reading import check_regular, reading

MAX_ARRAY_BYTES = 1 << 30
"""The most that is read as a whole: 2048 features of 100,000 images, and 20 times ADM's largest array."""

_NUMBERS, _NUMBERS_AND_TEXT = "fiub", "fiubUS"


@dataclass(frozen=True)
class Header:
    """What the header of an array states; its length in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    length: int

    @property
    def size(self) -> int:
        """Bytes of the array's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def npz_names(path: Path) -> frozenset[str]:
    """The names of the arrays. Raises UserError if it is no `.npz`."""
    with _archive(path) as archive:
        return frozenset(name.removesuffix(".npy") for name in archive.namelist())


def npz_arrays(path: Path, names: frozenset[str]) -> dict[str, np.ndarray]:
    """Arrays of numbers or text by name.

    Raises:
        UserError: one is missing, damaged, encrypted, larger than `MAX_ARRAY_BYTES`, or holds Python objects.
    """
    return {name: _array(path, name) for name in sorted(names)}


def npz_header(path: Path, name: str) -> Header:
    """Shape and type of an array of numbers in C order, which is not read.

    Raises:
        UserError: there is no such array, or it holds something else, or fewer bytes than its header states.
    """
    with _member(path, name) as (file, size):
        return _header(file, path, name, size=size)


def npz_rows(path: Path, name: str) -> Iterator[np.ndarray]:
    """The rows of an array, compressed or not. Raises UserError if there is no such array, or it is damaged."""
    header = npz_header(path, name)
    with _member(path, name) as (file, size):
        _header(file, path, name, size=size)
        row_size = math.prod(header.shape[1:]) * header.dtype.itemsize
        for _ in range(header.shape[0]):
            with reading(path, "an .npz of plain arrays", advice="write the file again"):
                row = file.read(row_size)
            if len(row) != row_size:
                raise UserError(f"{path}: {name} is truncated; write the file again")
            yield np.frombuffer(row, header.dtype).reshape(header.shape[1:]).copy()
        with reading(path, "an .npz of plain arrays", advice="write the file again"):
            file.read(1)  # at the end, zipfile compares the checksum


def _array(path: Path, name: str) -> np.ndarray:
    with _member(path, name) as (file, size):
        header = _header(file, path, name, size=size, kinds=_NUMBERS_AND_TEXT, any_order=True)
        if header.size > MAX_ARRAY_BYTES:
            raise UserError(
                f"{path}: {name} has {header.size >> 20} MiB, at most {MAX_ARRAY_BYTES >> 20} are read; "
                "is this a reference file?"
            )
        with reading(path, "an .npz of plain arrays", advice="write the file again"):
            content = bytearray(file.read(header.size + 1))  # the byte too many makes zipfile compare the checksum
        if len(content) != header.size:
            raise UserError(f"{path}: {name} is truncated; write the file again")
        found = np.frombuffer(content, header.dtype)
        return found.reshape(header.shape, order="F" if header.fortran_order else "C")


def _archive(path: Path) -> zipfile.ZipFile:
    with reading(path, "an .npz file"):
        return zipfile.ZipFile(check_regular(path))


@contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[IO[bytes], int]]:
    """An array's file in the archive, and its size when it is decompressed."""
    with _archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise UserError(f"{path}: holds no {name}")
        with reading(path, "an .npz file"):
            file, size = archive.open(f"{name}.npy"), archive.getinfo(f"{name}.npy").file_size
        with file:
            yield file, size


def _header(
    file: IO[bytes], path: Path, name: str, *, size: int, kinds: str = _NUMBERS, any_order: bool = False
) -> Header:
    with reading(path, "an .npz of plain arrays", advice="write the file again"):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        header = Header(shape, dtype, fortran_order, file.tell())
    if dtype.kind not in kinds or (fortran_order and not any_order and len(shape) > 1):
        raise UserError(
            f"{path}: {name} holds Python objects or an array in Fortran order, not plain arrays of numbers in C order "
            f"({str(dtype)[:40]}); write the file again"
        )
    if not all(type(side) is int and side >= 0 for side in shape) or header.length + header.size != size:
        raise UserError(
            f"{path}: {name} is truncated: its header states {str(dtype)[:40]} {list(shape)[:8]}, the archive holds "
            f"{max(0, size - header.length)} bytes of it; write the file again"
        )
    return header
