"""Writes the files of a set of samples: one array in an `.npz`, PNG files, or tars of them, with little in memory."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from cmscale.io.durable import explained, sync_file, sync_folder
from cmscale.io.fetch import cache_folder
from cmscale.io.place import Place
from cmscale.io.protocol import Storage
from cmscale.io.storage import open_parent
from cmscale.runs.results import hash_of
from cmscale.runs.sample_sets import TAR_SAMPLES

T = TypeVar("T")
_MOST_THREADS = 16


def sample_name(number: int) -> str:
    """The name of a sample's PNG file."""
    return f"{number:09d}.png"


def tar_name(number: int) -> str:
    """The name of the tar that begins with this sample."""
    return f"samples-{number:09d}.tar"


def write_npz(
    place: Place, images: Iterable[np.ndarray], *, count: int, shape: Sequence[int], dtype: str, key: str
) -> None:
    """Writes images as the array `arr_0` [count, *shape] of an `.npz`, with one in memory; equal images, equal bytes.

    Readers see the old file or the whole new one. `key` is the archive's comment.
    """
    storage, name = open_parent(place)
    final = storage.local_path(name)
    if final is None:
        staged = cache_folder() / "unfinished" / f"{hash_of({'place': place})[:16]}.npz"
    else:
        staged = Path(f"{final}.parts") / "whole.npz"  # removed together with the parts
    with explained(staged):
        staged.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            _write_array(file, images, count=count, shape=shape, dtype=dtype, key=key)
    if final is None:
        try:
            storage.upload(name, staged)
        finally:
            staged.unlink(missing_ok=True)
        return
    with explained(final):
        sync_file(staged)
        staged.replace(final)
        sync_folder(final.parent)


def npz_key(path: Path) -> str | None:
    """The key in an `.npz` on this machine; None if there is no such file, or it has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace") or None
    except Exception:  # whatever zipfile raises on a damaged file
        return None


def _write_array(
    file: io.BufferedWriter, images: Iterable[np.ndarray], *, count: int, shape: Sequence[int], dtype: str, key: str
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count, *shape)}
    member = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
    member.external_attr = 0o644 << 16
    with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for image in images:
            stream.write(np.ascontiguousarray(image, dtype=dtype).data)
        archive.comment = key.encode()


def write_pictures(
    folder: Storage, rows: Callable[[range], Iterator[np.ndarray]], wanted: range, *, threads: int
) -> None:
    """Writes the samples of a range as PNG files, named by their numbers."""

    def write(numbered: tuple[int, np.ndarray]) -> None:
        number, image = numbered
        folder.write(sample_name(number), png(image))

    with ThreadPoolExecutor(threads, thread_name_prefix="png") as pool:
        for _ in _mapped(pool, write, zip(wanted, rows(wanted), strict=True), threads):
            pass


def write_tar(folder: Storage, rows: Callable[[range], Iterator[np.ndarray]], wanted: range, *, threads: int) -> None:
    """Writes the samples of a range as a tar of PNG files; equal samples, equal bytes."""
    buffer = io.BytesIO()
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="png") as pool,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, data in zip(wanted, _mapped(pool, png, rows(wanted), threads), strict=True):
            member = tarfile.TarInfo(sample_name(number))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    folder.write(tar_name(wanted.start), buffer.getvalue())


def tars(count: int) -> list[range]:
    """The ranges of samples of the tars of a set."""
    return [range(at, min(at + TAR_SAMPLES, count)) for at in range(0, count, TAR_SAMPLES)]


def png(image: np.ndarray) -> bytes:
    """A uint8 image [H, W, 3] as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def threads_of(ranks_per_node: int) -> int:
    """How many threads a rank may take to encode and write."""
    return min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // ranks_per_node))


def _mapped(pool: ThreadPoolExecutor, action: Callable[[T], Any], items: Iterable[T], threads: int) -> Iterator[Any]:
    """The results in order, with few items at a time; `pool.map` alone would take all at once."""
    waiting = iter(items)
    while chunk := list(islice(waiting, 4 * threads)):
        yield from pool.map(action, chunk)
