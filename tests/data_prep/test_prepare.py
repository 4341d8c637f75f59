"""data_prep/prepare.py and verify.py: the same bytes in all circumstances, and one line for every mistake."""

import errno
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import encoded, picture, pictures, tree, write_lmdb
from PIL import Image

from cmscale.data import read_images
from cmscale.data.decode import decode
from cmscale.io.storage import LocalStorage, open_storage
from data_prep import prepare, verify
from data_prep.making.convert import crop
from data_prep.making.preparation import Preparation
from data_prep.making.shards import DatasetSettings
from data_prep.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
COUNT = 23


@pytest.fixture(scope="module")
def lsun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lmdb(tmp_path_factory.mktemp("lsun") / "photo_train_lmdb", pictures(COUNT))


def call(source: object, out: object, *more: str, format: str = "webdataset", size: int = 16) -> int:
    arguments = ["--source", str(source), "--out", str(out), "--format", format, "--image-size", str(size)]
    return prepare.main([*arguments, "--samples-per-shard", "4", "--workers", "1", *more])


def refused(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line of a refusal."""
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_same_bytes_whatever_the_number_of_workers(lsun: Path, tmp_path: Path, format: str) -> None:
    assert call(f"lsun:{lsun}", tmp_path / "one", format=format) == 0
    assert call(f"lsun:{lsun.parent}", tmp_path / "three", "--workers", "3", format=format) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    names = tree(tmp_path / "one").keys()
    assert {"manifest.json", "preparation.json"} < names
    assert len(names) == 3 + -(-COUNT // 4)


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_every_image_comes_back_in_the_order_of_its_keys(lsun: Path, tmp_path: Path, format: str) -> None:
    assert call(f"lsun:{lsun}", tmp_path / "out", "--encoding", "png", format=format) == 0
    got = {key: image for image, key in read_images(str(tmp_path / "out"))}
    expected = pictures(COUNT)
    assert list(got) == sorted(expected)
    for key, image in got.items():
        np.testing.assert_array_equal(image, crop(decode(expected[key]), size=16, preprocess="adm"))


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_a_run_killed_at_any_shard_continues_to_the_same_bytes(lsun: Path, tmp_path: Path, format: str) -> None:
    assert call(f"lsun:{lsun}", tmp_path / "whole", format=format) == 0
    command = [sys.executable, "-c", _KILLED_AFTER, "3", "--source", f"lsun:{lsun}", "--format", format]
    command += [
        "--out",
        str(tmp_path / "killed"),
        "--image-size",
        "16",
        "--samples-per-shard",
        "4",
        "--workers",
        "1",
    ]
    died = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    finished = [p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("shard*")]
    assert len(finished) == 3
    assert call(f"lsun:{lsun}", tmp_path / "killed", format=format) == 0
    assert tree(tmp_path / "whole") == tree(tmp_path / "killed")
    kept = [p.stat().st_mtime_ns for p in sorted((tmp_path / "killed").glob("shard*"))[:3]]
    assert sorted(finished) == sorted(kept)


_KILLED_AFTER = """
import os, signal, sys
from data_prep import prepare
from data_prep.making.preparation import Preparation
make = Preparation.make
def make_or_die(self, number, **kwargs):
    if number == int(sys.argv[1]):
        kwargs["tick"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return make(self, number, **kwargs)
Preparation.make = make_or_die
prepare.main(sys.argv[2:])
"""


def test_s3_holds_the_same_bytes_as_a_folder_and_no_notes(lsun: Path, tmp_path: Path, s3: str) -> None:
    assert call(f"lsun:{lsun}", tmp_path / "out") == 0
    assert call(f"lsun:{lsun}", f"{s3}/set") == 0
    storage = open_storage(f"{s3}/set")
    assert {entry.key: storage.read(entry.key) for entry in storage.list()} == tree(tmp_path / "out")


def test_an_interrupted_run_continues_on_s3(lsun: Path, tmp_path: Path, s3: str, monkeypatch) -> None:
    calls = []
    make = Preparation.make

    def make_three(self, number, **kwargs):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(self, number, **kwargs)

    monkeypatch.setattr(Preparation, "make", make_three)
    assert call(f"lsun:{lsun}", f"{s3}/set") == 130
    assert call(f"lsun:{lsun}", f"{s3}/set") == 0
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    assert call(f"lsun:{lsun}", tmp_path / "out") == 0
    storage = open_storage(f"{s3}/set")
    assert {entry.key: storage.read(entry.key) for entry in storage.list()} == tree(tmp_path / "out")


def test_folder_zip_and_tars_give_the_images_of_the_lmdb(lsun: Path, tmp_path: Path) -> None:
    # The suffix does not determine the format: the bytes do.
    samples = {f"{key}.png": data for key, data in pictures(5).items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in samples.items():
            (folder / name).write_bytes(data)
            archive.writestr(name, data)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name in samples:
            tar.add(folder / name, arcname=name)
    small = write_lmdb(tmp_path / "lmdb", pictures(5))
    for source in (
        f"lsun:{small}",
        f"folder:{folder}",
        f"zip:{tmp_path}/images.zip",
        f"tars:{tmp_path}/tars",
    ):
        assert call(source, tmp_path / source[:3]) == 0
    images = {kind: [image for image, _ in read_images(str(tmp_path / kind))] for kind in ("lsu", "fol", "zip", "tar")}
    for kind in images:
        np.testing.assert_array_equal(images[kind], images["lsu"])


def test_adm_boxes_then_crops_and_edm_crops_then_lanczos() -> None:
    image = picture(3, width=96, height=64)
    boxed = Image.fromarray(image).resize((48, 32), Image.Resampling.BOX).crop((8, 0, 40, 32))
    np.testing.assert_array_equal(crop(image, size=32, preprocess="adm"), boxed)
    square = Image.fromarray(image).crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(crop(image, size=32, preprocess="edm"), square)


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_lossless_encodings_keep_every_pixel(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "in").mkdir()
    image = picture(1, width=16, height=16)
    (tmp_path / "in" / "a.b.png").write_bytes(encoded(image, "png"))
    assert call(f"folder:{tmp_path}/in", tmp_path / "out", "--encoding", encoding) == 0
    (found, key) = next(read_images(str(tmp_path / "out")))
    assert key == "a.b.png"
    np.testing.assert_array_equal(found, image)


# Mistakes
# -----------------------------------------------------------------------------------------------------


def test_no_such_lmdb_is_one_line(tmp_path: Path, capsys) -> None:
    assert "none does not exist" in refused(capsys, call(f"lsun:{tmp_path}/none", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"not an lmdb at all" * 1000])
def test_a_folder_that_is_no_lmdb_is_one_line(tmp_path: Path, capsys, content: bytes | None) -> None:
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "data.mdb").write_bytes(content)
    assert "LMDB" in refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_truncated_lmdb_is_refused_before_reading_kills_the_process(lsun: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    data = (lsun / "data.mdb").read_bytes()
    (tmp_path / "in" / "data.mdb").write_bytes(data[: len(data) // 2])
    assert "truncated" in refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out"))


def test_an_empty_source_is_one_line(tmp_path: Path, capsys) -> None:
    write_lmdb(tmp_path / "in", {})
    assert "contains no images" in refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _bomb(side: int) -> bytes:
    """A PNG whose header claims side x side pixels."""
    data = bytearray(encoded(picture(0), "png"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


UNUSABLE = {
    "corrupt": (encoded(picture(0), "jpeg")[:300], "damaged jpeg"),
    "garbage": (b"no image", "neither JPEG, PNG nor WebP"),
    "empty": (b"", "neither JPEG, PNG nor WebP"),
    "small": (encoded(picture(0, width=40, height=15), "png"), "40x15 is smaller than the crop of 16 px"),
    "bomb": (_bomb(10_000), "10000x10000"),
    "larger bomb": (_bomb(60_000), "3600000000 pixels"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_an_unusable_image_is_named_and_refused_or_skipped(tmp_path: Path, capsys, kind: str, format: str) -> None:
    data, reason = UNUSABLE[kind]
    key = "0" * 40
    write_lmdb(tmp_path / "in", {**pictures(6), key: data})
    line = refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out", format=format))
    assert key in line
    assert reason in line
    assert not (tmp_path / "out").exists()
    assert call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "1", format=format) == 0
    assert "6 images in 2 shards, 1 skipped" in capsys.readouterr().out
    assert key in (tmp_path / "out" / "preparation.json").read_text()
    assert [k for _, k in read_images(str(tmp_path / "out"))] == sorted(pictures(6))


def test_the_budget_counts_over_shards_and_a_larger_one_continues(tmp_path: Path, capsys) -> None:
    bad = {f"{n:x}" * 40: b"no image" for n in (0, 15)}
    write_lmdb(tmp_path / "in", {**pictures(14), **bad})
    line = refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "1"))
    assert all(key in line for key in bad)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "2") == 0
    assert "continuing" in capsys.readouterr().out


def test_a_shard_without_a_usable_image_is_left_out_and_a_source_without_one_refused(tmp_path: Path, capsys) -> None:
    bad = {f"{n:040x}": b"no image" for n in range(4)}
    write_lmdb(tmp_path / "in", {**pictures(6), **bad})
    assert call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "4", format="mds") == 0
    assert len(list(read_images(str(tmp_path / "out")))) == 6
    write_lmdb(tmp_path / "worse", bad)
    assert "none of its 4" in refused(capsys, call(f"lsun:{tmp_path}/worse", tmp_path / "none", "--max-bad", "4"))
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_a_missing_bucket_is_one_line(lsun: Path, s3: str, capsys) -> None:
    assert "no bucket 'not-there'" in refused(capsys, call(f"lsun:{lsun}", "s3://not-there/set"))


def test_missing_credentials_are_one_line(lsun: Path, s3: str, capsys, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "no S3 credentials" in refused(capsys, call(f"lsun:{lsun}", f"{s3}/set"))


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_no_room_on_the_disk_is_one_line_and_leaves_nothing(lsun, tmp_path, capsys, monkeypatch, format) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("webdataset.writer.TarWriter.write", full)
    monkeypatch.setattr("streaming.base.format.mds.MDSWriter.flush_shard", full)
    assert "no space left" in refused(capsys, call(f"lsun:{lsun}", tmp_path / "out", format=format))
    assert not (tmp_path / "out").exists()


def test_another_data_set_in_the_folder_is_refused_and_a_published_one_stays_as_it_is(
    lsun: Path, tmp_path, capsys
) -> None:
    assert call(f"lsun:{lsun}", tmp_path / "out") == 0
    before = tree(tmp_path / "out")
    assert call(f"lsun:{lsun}", tmp_path / "out") == 0
    assert "already prepared" in capsys.readouterr().out
    assert "another data set" in refused(capsys, call(f"lsun:{lsun}", tmp_path / "out", size=8))
    assert tree(tmp_path / "out") == before


def test_two_at_once_are_refused(lsun: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    preparation = Preparation(open_source(f"lsun:{lsun}"), _settings(), str(tmp_path / "out"))
    preparation.begin()
    with preparation.exclusive():
        assert "preparing" in refused(capsys, call(f"lsun:{lsun}", tmp_path / "out"))


def _settings() -> DatasetSettings:
    return DatasetSettings(format="webdataset", image_size=16, preprocess="adm", encoding="jpeg", samples_per_shard=4)


# verify.py
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mds", "webdataset"])
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_verify_names_every_bad_file_and_repair_restores_the_bytes(lsun, tmp_path, s3, capsys, format, place) -> None:
    url = str(tmp_path / "out") if place == "folder" else f"{s3}/set"
    assert call(f"lsun:{lsun}", url, format=format) == 0
    assert verify.main([url]) == 0
    storage = open_storage(url)
    before = {entry.key: storage.read(entry.key) for entry in storage.list()}
    index = next(key for key in before if key.startswith("index"))
    shards = sorted(key for key in before if key.startswith("shard"))
    flipped = bytearray(before[shards[0]])
    flipped[1000] ^= 1
    storage.write(shards[0], bytes(flipped))
    storage.write(shards[2], before[shards[2]][:-7])
    storage.write(index, b"{}")
    storage.delete(shards[3])
    capsys.readouterr()
    assert verify.main([url]) == 1
    named = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    assert named == [index, shards[0], shards[2], shards[3]]
    assert verify.main([url, "--repair"]) == 0
    assert {entry.key: storage.read(entry.key) for entry in storage.list()} == before


def test_repair_from_another_source_replaces_nothing(lsun: Path, tmp_path: Path, capsys) -> None:
    assert call(f"lsun:{lsun}", tmp_path / "out") == 0
    shard = tmp_path / "out" / "shard-00001.tar"
    shard.write_bytes(b"bad")
    write_lmdb(tmp_path / "other", pictures(3))
    capsys.readouterr()
    status = verify.main([str(tmp_path / "out"), "--repair", "--source", f"lsun:{tmp_path}/other"])
    assert "not the images" in refused(capsys, status)
    assert shard.read_bytes() == b"bad"


def test_verify_of_no_data_set_is_one_line(tmp_path: Path, capsys) -> None:
    assert "no prepared data set" in refused(capsys, verify.main([str(tmp_path)]))


def test_a_manifest_that_does_not_match_is_refused(lsun: Path, tmp_path: Path, capsys) -> None:
    assert call(f"lsun:{lsun}", tmp_path / "out") == 0
    storage = LocalStorage(tmp_path / "out")
    storage.write("manifest.json", storage.read("manifest.json").replace(b'"count": 4', b'"count": 5'))
    capsys.readouterr()
    assert "does not match" in refused(capsys, verify.main([str(tmp_path / "out")]))
