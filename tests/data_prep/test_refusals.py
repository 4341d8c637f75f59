"""data_prep/prepare.py: one line for every mistake, and nothing left behind."""

import errno
import os
import zlib
from pathlib import Path

import pytest
from data_fixtures import FORMATS, encoded, encoded_images, smooth_image, tree, write_lmdb
from prepare_command import call, refused

from cmscale.data import read_images
from data_prep.making.preparation import Preparation
from data_prep.making.shards import DatasetSettings
from data_prep.sources import open_source


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


def test_a_truncated_lmdb_is_refused_before_reading_kills_the_process(source: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    data = (source / "data.mdb").read_bytes()
    (tmp_path / "in" / "data.mdb").write_bytes(data[: len(data) // 2])
    assert "truncated" in refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out"))


def test_an_empty_source_is_one_line(tmp_path: Path, capsys) -> None:
    write_lmdb(tmp_path / "in", {})
    assert "contains no images" in refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _bomb(side: int) -> bytes:
    """A PNG whose header claims side x side pixels."""
    data = bytearray(encoded(smooth_image(0), "png"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


UNUSABLE = {
    "corrupt": (encoded(smooth_image(0), "jpeg")[:300], "damaged jpeg"),
    "garbage": (b"no image", "no picture in a format that is read"),
    "empty": (b"", "no picture in a format that is read"),
    "small": (encoded(smooth_image(0, width=40, height=15), "png"), "40x15 is smaller than the crop of 16 px"),
    "bomb": (_bomb(10_000), "10000x10000"),
    "larger bomb": (_bomb(60_000), "3600000000 pixels"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("format", FORMATS)
def test_an_unusable_image_is_named_and_refused_or_skipped(tmp_path: Path, capsys, kind: str, format: str) -> None:
    data, reason = UNUSABLE[kind]
    key = "0" * 40
    write_lmdb(tmp_path / "in", {**encoded_images(6), key: data})
    line = refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out", format=format))
    assert key in line
    assert reason in line
    assert not (tmp_path / "out").exists()
    assert call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "1", format=format) == 0
    assert "6 images in 2 shards, 1 skipped" in capsys.readouterr().out
    assert key in (tmp_path / "out" / "preparation.json").read_text()
    assert [k for _, k in read_images(str(tmp_path / "out"))] == sorted(encoded_images(6))


def test_the_budget_counts_over_shards_and_a_larger_one_continues(tmp_path: Path, capsys) -> None:
    bad = {f"{n:x}" * 40: b"no image" for n in (0, 15)}
    write_lmdb(tmp_path / "in", {**encoded_images(14), **bad})
    line = refused(capsys, call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "1"))
    assert all(key in line for key in bad)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "2") == 0
    assert "continuing" in capsys.readouterr().out


def test_a_shard_without_a_usable_image_is_left_out_and_a_source_without_one_refused(tmp_path: Path, capsys) -> None:
    bad = {f"{n:040x}": b"no image" for n in range(4)}
    write_lmdb(tmp_path / "in", {**encoded_images(6), **bad})
    assert call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "4", format="mds") == 0
    assert len(list(read_images(str(tmp_path / "out")))) == 6
    write_lmdb(tmp_path / "worse", bad)
    assert "none of its 4" in refused(capsys, call(f"lsun:{tmp_path}/worse", tmp_path / "none", "--max-bad", "4"))
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_a_missing_bucket_is_one_line(source: Path, s3: str, capsys) -> None:
    assert "no bucket 'not-there'" in refused(capsys, call(f"lsun:{source}", "s3://not-there/set"))


def test_missing_credentials_are_one_line(source: Path, s3: str, capsys, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "no S3 credentials" in refused(capsys, call(f"lsun:{source}", f"{s3}/set"))


@pytest.mark.parametrize("format", FORMATS)
def test_no_room_on_the_disk_is_one_line_and_leaves_nothing(source, tmp_path, capsys, monkeypatch, format) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("webdataset.writer.TarWriter.write", full)
    monkeypatch.setattr("streaming.base.format.mds.MDSWriter.flush_shard", full)
    status = call(f"lsun:{source}", tmp_path / "out", format=format)
    assert "no space left" in refused(capsys, status, expected=1)
    assert not (tmp_path / "out").exists()


def test_another_data_set_in_the_folder_is_refused_and_a_published_one_stays_as_it_is(
    source: Path, tmp_path, capsys
) -> None:
    assert call(f"lsun:{source}", tmp_path / "out") == 0
    before = tree(tmp_path / "out")
    assert call(f"lsun:{source}", tmp_path / "out") == 0
    assert "already prepared" in capsys.readouterr().out
    assert "another data set" in refused(capsys, call(f"lsun:{source}", tmp_path / "out", size=8))
    assert tree(tmp_path / "out") == before


def test_two_at_once_are_refused(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.making.preparation._LOCK_SECONDS", 0.0)
    preparation = Preparation(open_source(f"lsun:{source}"), _settings(), str(tmp_path / "out"))
    preparation.begin()
    with preparation.exclusive():
        assert "another process holds the lock" in refused(capsys, call(f"lsun:{source}", tmp_path / "out"))


def _settings() -> DatasetSettings:
    return DatasetSettings(format="webdataset", image_size=16, preprocess="adm", encoding="jpeg", samples_per_shard=4)
