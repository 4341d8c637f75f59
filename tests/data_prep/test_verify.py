"""data_prep/verify.py: every bad file is named, and repaired only if it comes out as it was published."""

from pathlib import Path

import pytest
from data_fixtures import FORMATS, encoded, encoded_images, smooth_image, write_lmdb
from prepare_command import call, refused

from cmscale.io.storage import open_storage
from data_prep import verify


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_verify_names_every_bad_file_and_repair_restores_the_bytes(source, tmp_path, s3, capsys, format, place) -> None:
    url = str(tmp_path / "out") if place == "folder" else f"{s3}/set"
    assert call(f"lsun:{source}", url, format=format) == 0
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


def test_repair_from_another_source_replaces_nothing(source: Path, tmp_path: Path, capsys) -> None:
    assert call(f"lsun:{source}", tmp_path / "out") == 0
    shard = tmp_path / "out" / "shard-00001.tar"
    shard.write_bytes(b"bad")
    write_lmdb(tmp_path / "other", encoded_images(3))
    capsys.readouterr()
    status = verify.main([str(tmp_path / "out"), "--repair", "--source", f"lsun:{tmp_path}/other"])
    assert "not the images" in refused(capsys, status)
    assert shard.read_bytes() == b"bad"


def test_verify_of_no_data_set_is_one_line(tmp_path: Path, capsys) -> None:
    assert "no prepared data set" in refused(capsys, verify.main([str(tmp_path)]))


def test_a_manifest_that_does_not_match_is_refused(source: Path, tmp_path: Path, capsys) -> None:
    assert call(f"lsun:{source}", tmp_path / "out") == 0
    storage = open_storage(tmp_path / "out")
    storage.write("manifest.json", storage.read("manifest.json").replace(b'"count": 4', b'"count": 5'))
    capsys.readouterr()
    assert "does not match" in refused(capsys, verify.main([str(tmp_path / "out")]))


def test_a_file_that_cannot_be_read_is_named_beside_the_others(source: Path, tmp_path: Path, capsys) -> None:
    assert call(f"lsun:{source}", tmp_path / "out") == 0
    (tmp_path / "out" / "shard-00001.tar").unlink()
    (tmp_path / "out" / "shard-00001.tar").mkdir()  # reading it fails as on a bad place of a disk
    (tmp_path / "out" / "shard-00003.tar").unlink()
    capsys.readouterr()
    assert verify.main([str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["bad: shard-00001.tar: can't be read (Is a directory)", "bad: shard-00003.tar: missing"]


def test_repair_from_images_that_have_been_damaged_since_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(smooth_image(number), "png"))
    assert call(f"folder:{tmp_path}/in", tmp_path / "out") == 0
    (tmp_path / "out" / "shard-00001.tar").write_bytes(b"bad")
    (tmp_path / "in" / "5.png").write_bytes(b"no picture")
    capsys.readouterr()
    error = refused(capsys, verify.main([str(tmp_path / "out"), "--repair"]))
    assert "shard-00001.tar: made again, it differs" in error
    assert "unusable: 5.png: no picture" in error
