"""A reference file is never trusted: what it claims is checked before memory is allocated; nothing is executed."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_fixtures import build_cheap_features

from cmscale.errors import UserError
from cmscale.evaluation.reference.registry import read_reference
from cmscale.evaluation.sample_files import open_images

EXTRACTOR = build_cheap_features()
MEAN, COVARIANCE = np.zeros(16), np.eye(16)
POINTERS = struct.pack("<16Q", *range(0x4141414141414141, 0x4141414141414151))


class ObjectsOverBytes:
    """An array of objects whose pointers come from the file: following one ends the process."""

    def __reduce__(self) -> Any:
        return np.ndarray, ((16,), "O", POINTERS)


class ObjectsByState:
    """The same, by numpy's own reconstruction."""

    def __reduce__(self) -> Any:
        function, arguments, _ = np.zeros(16).__reduce__()
        return function, arguments, (1, (16,), np.dtype("O"), False, POINTERS)


class HugeArray:
    """An array that claims a billion rows."""

    def __reduce__(self) -> Any:
        return np.ndarray, ((10**9, 2048), "<f8", b"")


class WrongSize:
    def __reduce__(self) -> Any:
        return np.ndarray, ((16,), "<f8", bytes(8))


@pytest.mark.parametrize("name", ["x.pkl", "x.pt", "older.pt"])
@pytest.mark.parametrize(
    ("mean", "line"),
    [
        (ObjectsOverBytes(), "holds O, not numbers"),
        (ObjectsByState(), "not numbers"),
        (HugeArray(), r"shape \[1000000000, 2048\], type float64, has 0 bytes"),
        (WrongSize(), r"shape \[16\], type float64, has 8 bytes"),
        ("a" * 100_000, "str where an array of numbers is needed"),
        ([[1.0]] * 1000, "list where an array of numbers is needed"),
    ],
)
def test_arrays_are_numbers_of_the_stated_size(tmp_path: Path, name: str, mean: Any, line: str) -> None:
    content = {"mu": mean, "sigma": COVARIANCE}
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps({"num_images": 10, "fid": content}))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not name.startswith("older"))
    with pytest.raises(UserError, match=line) as caught:
        read_reference(tmp_path / name, EXTRACTOR)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("old", [False, True])
def test_tensors_are_read_in_both_layouts_and_never_beyond_their_storage(tmp_path: Path, old: bool) -> None:
    saved = {"mu": torch.arange(16.0), "sigma": torch.from_numpy(COVARIANCE).to(torch.bfloat16).T}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    assert np.array_equal(read_reference(tmp_path / "x.pt", EXTRACTOR).pooled.mean, np.arange(16.0))
    torch.save({"mu": torch.zeros(1).expand(10**9), "sigma": saved["sigma"]}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"shape \[1000000000\] does not fit its storage of 1 elements"):
        read_reference(tmp_path / "x.pt", EXTRACTOR)


def with_header(
    shape: str, *, descr: str = "'|u1'", content: bytes = b"", compressed: int = zipfile.ZIP_STORED
) -> bytes:
    """An `.npz` whose `arr_0` has a header of anybody's making."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compressed) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (with_header("(1000000000, 32, 32, 3)"), r"is truncated: its header states uint8 \[1000000000, 32, 32, 3\]"),
        (with_header("(1000000000, 0, 8, 3)"), r"arr_0 must be uint8 \[N, H, W, 3\]"),
        (with_header("(-1, 8, 8, 3)"), "is truncated"),
        (with_header("(2, 8, 8, 3)", descr="'<f4'", content=bytes(1536)), "arr_0 must be uint8"),
        (
            with_header("(2, 3, 8, 8)", content=bytes(384)),
            r"arr_0 must be uint8 \[N, H, W, 3\], it is uint8 \[2, 3, 8, 8\]",
        ),
        (with_header("(2, 8)", content=bytes(16)), r"it is uint8 \[2, 8\]"),
        (with_header("(2,)", descr="'|O'", content=bytes(16)), "Python objects"),
        (with_header("(" * 3000), "damaged, or not an .npz of plain arrays"),
        (b"", "not an .npz file"),
    ],
)
def test_what_an_archive_claims_is_checked_first(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=line) as caught:
        open_images(tmp_path / "x.npz")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert len(str(caught.value)) < 500


def test_a_member_that_unpacks_to_more_than_a_reference_has_is_not_unpacked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cmscale.evaluation.npz.MAX_ARRAY_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "x.npz", mu=MEAN, sigma=np.zeros((2048, 2048)))
    tracemalloc.start()
    with pytest.raises(UserError, match="sigma has 32 MiB, at most 1 are read"):
        read_reference(tmp_path / "x.npz", EXTRACTOR)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"count": np.array("many")}, "count must be a whole number"),
        ({"count": np.array([1, 2])}, "count must be a whole number"),
        ({"count": np.array(-5)}, "count must be a whole number above 0, it is -5"),
        ({"features": np.array(["a", "b"])}, "features must be a short text"),
        ({"features": np.array(3)}, "features must be a short text"),
        ({"features": np.frombuffer(b"\xff\xff\xff\x7f", "<U1").reshape(())}, "features: damaged, or not a short text"),
        ({"mu": np.full(16, "0.5")}, "must be real numbers"),
        ({"features_0": np.zeros((2, 2, 2))}, r"features_0 \[2, 2, 2\]"),
        ({"mu": np.zeros((2, 16))}, "don't fit"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, None),
        ({"somebodys": np.zeros((3, 3), "M8[s]")}, None),
    ],
)
def test_mistyped_members_are_one_line(tmp_path: Path, arrays: dict[str, Any], line: str | None) -> None:
    np.savez(tmp_path / "x.npz", **({"mu": MEAN, "sigma": COVARIANCE, "mu_x": MEAN} | arrays))
    if line is None:
        read_reference(tmp_path / "x.npz", EXTRACTOR)
        return
    with pytest.raises(UserError, match=line):
        read_reference(tmp_path / "x.npz", EXTRACTOR)
