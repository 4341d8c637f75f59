"""data_prep/sources: no image is lost without a word; incomplete archives are refused."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from data_fixtures import encoded, encoded_images, smooth_image, write_lmdb
from prepare_command import call, refused

from cmscale.data import read_images
from cmscale.errors import UserError
from cmscale.io.image_files import HIDDEN
from data_prep.sources import SourceReader, open_source
from data_prep.sources.tars import open_tars

PNG = encoded(smooth_image(0), "png")


def _tar(path: Path, names: list[str], *, links: dict[str, tuple[bytes, str]] | None = None) -> Path:
    """A tar of PNGs; `links` maps a name to (type, target)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
        for name, (kind, target) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def _end(path: Path) -> int:
    with tarfile.open(path) as tar:
        for _ in tar:
            pass
        return tar.offset


def test_what_a_folder_holds_besides_images_is_named_and_counted(tmp_path: Path, capsys) -> None:
    root = tmp_path / "in"
    for name, kind in (
        ("a.png", "png"),
        ("c/b.gif", "gif"),
        ("c/t.tif", "tiff"),
        ("c/x.bmp", "bmp"),
        ("v.avif", "avif"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(smooth_image(1), kind))
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "l.jpg").write_bytes(encoded(smooth_image(2), "jpeg"))
    (root / "linked").symlink_to(tmp_path / "class")
    (root / "._a.png").write_bytes(b"Mac")
    (root / "notes.txt").write_text("no image")
    (root / "phone.heic").write_bytes(b"no format of Pillow's")
    (root / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "pipe.png")
    line = refused(capsys, call(f"folder:{root}", tmp_path / "out"))
    assert "gone.png: a broken link" in line
    assert call(f"folder:{root}", tmp_path / "out", "--max-bad", "2") == 0
    said = capsys.readouterr().out
    assert "6 images in 2 shards, 2 skipped" in said
    assert "skipped: gone.png: a broken link\nskipped: pipe.png: not a regular file\n" in said
    assert "left out: .heic files: 1 (phone.heic)" in said
    assert f"left out: {HIDDEN}: 1 (._a.png)" in said
    keys = [key for _, key in read_images(str(tmp_path / "out"))]
    assert keys == ["a.png", "c/b.gif", "c/t.tif", "c/x.bmp", "linked/l.jpg", "v.avif"]
    written = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert written["left_out"][".txt files"] == [1, ["notes.txt"]]
    assert [key for key, _ in written["skipped"]] == ["gone.png", "pipe.png"]


def test_many_skipped_images_are_all_named_in_the_file(tmp_path: Path, capsys) -> None:
    write_lmdb(tmp_path / "in", {**encoded_images(4), **{f"{n:040x}": b"no image" for n in range(30)}})
    assert call(f"lsun:{tmp_path}/in", tmp_path / "out", "--max-bad", "30") == 0
    said = capsys.readouterr().out
    assert said.count("\nskipped: ") == 21
    assert f"and 10 more, all named in {tmp_path}/out/preparation.json" in said
    assert len(json.loads((tmp_path / "out" / "preparation.json").read_text())["skipped"]) == 30


def test_a_source_without_images_says_what_it_holds(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photo.heic").write_bytes(b"x")
    assert ".heic files: 1 (photo.heic)" in refused(capsys, call(f"folder:{tmp_path}/in", tmp_path / "out"))


def test_archives_hide_what_folders_hide_and_take_what_folders_take(tmp_path: Path) -> None:
    names = ["a.png", "c/b.gif", "__MACOSX/._a.png", "c/.hidden.png", "c/._b.gif", "readme.txt"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.mkdir("empty")
        for name in names:
            archive.writestr(name, PNG)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", PNG)
    source = open_source(f"zip:{tmp_path}/x.zip")
    assert source.keys == ["a.png", "c/b.gif"]
    assert source.left_out.counts[HIDDEN] == 3
    assert "files that a later one of the same name replaces: 1 (a.png)" in str(source.left_out)
    _tar(tmp_path / "tars" / "0.tar", [*names, "a.png"])
    _tar(tmp_path / "tars" / "sub" / "1.tar", ["z.png"])
    (tmp_path / "tars" / "._0.tar").write_bytes(b"Mac")
    (tmp_path / "tars" / "captions.json").write_text("{}")
    source = open_source(f"tars:{tmp_path}/tars")
    assert source.keys == ["0/a.png", "0/c/b.gif", "sub/1/z.png"]
    assert source.left_out.counts[HIDDEN] == 4
    assert source.left_out.counts[".json files"] == 1
    assert open_source(f"tars:{tmp_path}/tars/0.tar").keys == ["0/a.png", "0/c/b.gif"]


def test_links_in_a_tar_are_the_files_they_name_or_are_named(tmp_path: Path) -> None:
    links = {
        "c/hard.png": (tarfile.LNKTYPE, "c/a.png"),
        "c/soft.png": (tarfile.SYMTYPE, "../b.png"),
        "gone.png": (tarfile.SYMTYPE, "nowhere.png"),
    }
    _tar(tmp_path / "0.tar", ["c/a.png", "b.png"], links=links)
    source = open_tars(tmp_path)
    read = SourceReader(source)
    assert source.keys == ["0/b.png", "0/c/a.png", "0/c/hard.png", "0/c/soft.png", "0/gone.png"]
    assert all(read(key) == PNG for key in source.keys[:4])
    with pytest.raises(Exception, match=r"a link to nowhere.png, which is not in the tar"):
        read("0/gone.png")


def test_a_tar_that_is_not_complete_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = _tar(tmp_path / "0.tar", ["a.png", "b.png", "c.png"])
    whole, end = path.read_bytes(), _end(path)
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
    damaged = {
        "cut at a member": whole[: starts[2]],
        "cut at the end": whole[:end],
        "one block of zeros": whole[: end + 512],
        "cut in a header": whole[: starts[2] + 100],
        "cut in a file": whole[: starts[2] + 512 + 40],
        "filled with zeros": whole[: starts[2]] + bytes(30_000),
        "garbage for a header": whole[: starts[2]] + b"x" * 512 + whole[starts[2] + 512 :],
        "two tars": whole + whole,
        "empty": b"",
    }
    for how, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"0\.tar is not a tar, or a damaged or incomplete one"):
            print(how, len(open_tars(tmp_path).keys))
    for content in (whole, whole[: end + 1024], whole[: end + 1536]):
        path.write_bytes(content)
        assert len(open_tars(tmp_path).keys) == 3


def test_the_counts_of_img2dataset_must_agree_with_its_tars(tmp_path: Path) -> None:
    _tar(tmp_path / "00000.tar", ["0.png", "1.png", "0.json"])
    stats = tmp_path / "00000_stats.json"
    stats.write_text(json.dumps({"count": 3, "successes": 2, "failed_to_download": 1}))
    assert len(open_tars(tmp_path).keys) == 2
    stats.write_text(json.dumps({"count": 3, "successes": 3}))
    with pytest.raises(UserError, match=r"00000_stats.json counts 3 images, its tar holds 2"):
        open_tars(tmp_path)
    stats.write_text("{}")
    with pytest.raises(UserError, match="states no number of successes"):
        open_tars(tmp_path)
    stats.write_text(json.dumps({"successes": 2}))
    (tmp_path / "00001_stats.json").write_text(json.dumps({"successes": 7}))
    with pytest.raises(UserError, match=r"00001_stats\.json counts 7 images, but has no tar"):
        open_tars(tmp_path)


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "sub/0.TAR.zst"])
def test_compressed_tars_are_refused_not_passed_over(tmp_path: Path, name: str) -> None:
    _tar(tmp_path / "1.tar", ["a.png"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"compressed")
    with pytest.raises(UserError, match="is compressed"):
        open_tars(tmp_path)
