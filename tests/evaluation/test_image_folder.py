"""Folders of finished images: what is counted, left out and decided is said; a stray size is named before measuring."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmscale.errors import UserError
from cmscale.evaluation.sample_files import open_images
from data_prep.sources import open_source

RANDOM = np.random.default_rng(0)


def _image(*shape: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, shape or (8, 8, 3), dtype=np.uint8))


def test_copies_and_broken_links_do_not_count_and_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.tif", "c/d.bmp", "e.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        _image().save(tmp_path / name)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    _image().save(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "log.txt").write_text("x")
    images = open_images(tmp_path)
    assert images.count == 4 == len(list(images.read()))
    (left_out, lossy) = images.notes()
    assert "4 images counted; left out: .txt files: 1 (log.txt); broken links: 1 (gone.png); hidden" in left_out
    assert "1 GIF of 4 images are stored with loss" in lossy
    prepared = open_source(f"folder:{tmp_path}")
    assert len(prepared.keys) == 5  # a broken link is an image that can't be used: it counts against --max-bad
    assert prepared.left_out.counts.keys() == {".txt files", "hidden files and folders"}


def test_an_image_of_another_size_is_named_before_the_others_are_measured(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "d.png"):
        _image().save(tmp_path / name)
    _image(4, 8, 3).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"different sizes: c.png has 4 x 8 pixels \(height x width\), a.png 8 x 8"):
        open_images(tmp_path)


def test_jpegs_and_lossy_webp_are_noted_and_lossless_is_not(tmp_path: Path) -> None:
    _image().save(tmp_path / "a.jpg")
    _image().save(tmp_path / "b.webp", lossless=True)
    _image().save(tmp_path / "c.webp", quality=80)
    _image(8, 8, 4).save(tmp_path / "d.webp", quality=80)  # with transparency: an extended file
    _image().save(tmp_path / "e.png")
    images = open_images(tmp_path)
    assert len(list(images.read())) == 5
    assert any("1 JPEG, 2 WEBP of 5 images are stored with loss" in note for note in images.notes())
    list(images.read())  # reading again counts anew
    assert any("1 JPEG, 2 WEBP of 5 images" in note for note in images.notes())


def test_pictures_that_need_a_rule_are_read_by_it_and_noted(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    _image().save(tmp_path / "b.png", exif=exif)
    _image(8, 8, 4).save(tmp_path / "c.png")
    images = open_images(tmp_path)
    first = next(images.read())
    assert (first == 40_000 // 256).all()
    list(images.read())
    assert [note.split(": ", 1)[1] for note in images.notes()] == [
        "1 of 3 images: EXIF orientation, ignored",
        "1 of 3 images: more than 8 bits per channel, reduced to 8",
        "1 of 3 images: transparency, composited on white",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.png", "not an image that can be read"), ("f.png/x.png", "no picture"), ("f.tif", "f.tif")],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("no image")
    with pytest.raises(UserError, match=words):
        open_images(tmp_path)


def test_a_folder_with_nothing_but_other_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.heic").write_text("no image")
    with pytest.raises(UserError, match=r"no images there, only .heic files: 1 \(x.heic\)"):
        open_images(tmp_path)
