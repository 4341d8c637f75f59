"""Folders are listed alike everywhere: links followed once, hidden files never, everything else counted and named."""

import os
from pathlib import Path

import pytest

from cmscale.errors import UserError
from cmscale.io import image_files
from cmscale.io.image_files import BROKEN_LINK, HIDDEN, READ_ALREADY, image_suffixes, is_hidden, list_files, printable


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_links_are_followed_once_hidden_files_never_and_the_rest_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _touch(root, "a.png", "class/b.JPG", "class/deep/c.avif", "notes.txt", "README")
    _touch(root, "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/class/._b.jpg", "@eaDir/a.png/S.jpg")
    _touch(tmp_path, "elsewhere/d.gif", "elsewhere/e.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root / "class")
    (root / "class" / "up").symlink_to("..")
    (root / "class" / "above").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "file.webp").symlink_to(root / "a.png")
    _touch(tmp_path, "outside/f", "outside/g.png", "root/.hidden.png")
    for name, target in (("one.png", "f"), ("two.png", "f"), ("three.png", "g.png")):
        (root / name).symlink_to(tmp_path / "outside" / target)
    (root / "shown.png").symlink_to(".hidden.png")
    (root / "gone.png").symlink_to("nowhere")
    (root / "circle.png").symlink_to("circle.png")
    (root / "folder.png").mkdir()
    _touch(root, "folder.png/f.tif")
    os.mkfifo(root / "pipe.png")
    found = list_files(root, image_suffixes())
    assert found.files == [
        "a.png",
        "class/b.JPG",
        "class/deep/c.avif",
        "folder.png/f.tif",
        "linked/d.gif",
        "linked/e.png",
        "one.png",
        "shown.png",
        "three.png",
    ]
    assert found.lost == {"circle.png": BROKEN_LINK, "gone.png": BROKEN_LINK, "pipe.png": image_files.NOT_REGULAR}
    counts = dict(found.left_out.counts)
    assert counts == {
        HIDDEN: 5,
        READ_ALREADY: 4,
        image_files.FILE_READ_ALREADY: 2,
        ".txt files": 1,
        "files without a suffix": 1,
    }
    assert "links to files that are read already: 2 (file.webp, two.png)" in str(found.left_out)
    assert ".txt files: 1 (notes.txt)" in str(found.left_out)
    assert "class/up/" in str(found.left_out)


def test_the_root_may_be_hidden_or_a_link(tmp_path: Path) -> None:
    _touch(tmp_path, ".data/a.png")
    (tmp_path / "link").symlink_to(".data")
    assert list_files(tmp_path / ".data", image_suffixes()).files == ["a.png"]
    assert list_files(tmp_path / "link", image_suffixes()).files == ["a.png"]


def test_a_folder_that_cannot_be_read_is_refused_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "a/x.png", "b/y.png")
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"/b: the folder can't be read \(Permission denied\)"):
        list_files(tmp_path, image_suffixes())


def test_names_are_printed_in_one_line() -> None:
    assert printable("a\nb\udce9 ü.png") == "a\\nb\\udce9 ü.png"


@pytest.mark.parametrize("name", ["a/._b.jpg", ".x/b.jpg", "__MACOSX/b.jpg", "./a/.b"])
def test_hidden_parts_of_a_path_hide_it(name: str) -> None:
    assert is_hidden(name)
    assert not is_hidden("./a/b..c/../d.jpg")
