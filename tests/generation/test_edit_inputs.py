"""Pictures and masks of `cmscale edit`: small pictures keep their pixels, masks fit or are refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmscale.errors import UserError
from cmscale.generation.edit_inputs import Mask, fit, fit_mask, fit_small, read_mask, read_picture
from cmscale.generation.edit_request import result_paths
from cmscale.io.place import Place

RANDOM = np.random.default_rng(0)
HOLE = np.zeros((16, 16), bool)
HOLE[3:9, 5:12] = True
PHOTOGRAPH = RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8)


def _saved(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def _rgba(colours: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    return np.dstack([colours, np.where(opaque, 255, 0).astype(np.uint8)])


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None].astype(np.uint8), 3, axis=-1)


def test_a_picture_is_turned_as_its_exif_says_and_comes_in_at_the_model_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTOGRAPH).save(tmp_path / "turned.png", exif=exif)
    picture = read_picture(tmp_path / "turned.png")
    assert np.array_equal(picture.pixels, PHOTOGRAPH.swapaxes(0, 1)[:, ::-1])
    Image.new("RGB", (100, 50), (10, 20, 30)).save(tmp_path / "wide.png")
    image = fit(read_picture(tmp_path / "wide.png").pixels, size=16)
    assert image.shape == (3, 16, 16)
    assert image[:, 3, 5].tolist() == [10, 20, 30]


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name, words in (("text.png", "not an image"), ("absent.png", "no such file"), (".", "is a folder")):
        with pytest.raises(UserError, match=words):
            read_picture(tmp_path / name)


@pytest.mark.parametrize("shape", [(8, 8), (8, 11), (13, 8)])
def test_a_small_picture_keeps_its_pixels_for_super_resolution(shape: tuple[int, int]) -> None:
    pixels = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
    fitted = fit_small(pixels, size=32, factor=4, path=Path("p"))
    means = fitted.reshape(3, 8, 4, 8, 4).mean(axis=(2, 4))
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    assert np.array_equal(means.transpose(1, 2, 0), pixels[top : top + 8, left : left + 8])


def test_super_resolution_reduces_what_is_larger_than_its_patches_and_refuses_what_is_smaller() -> None:
    flat = np.full((20, 20, 3), 77, np.uint8)
    assert (fit_small(flat, size=32, factor=4, path=Path("p")) == 77).all()
    assert np.array_equal(fit_small(np.tile(flat, (2, 2, 1)), size=32, factor=4, path=Path("p")), fit(flat, size=32))
    with pytest.raises(UserError, match="p: its shorter side has 6 pixels; --factor 4 makes 32 of 8"):
        fit_small(flat[:6], size=32, factor=4, path=Path("p"))


MASKS = {
    "white on black": _grey(HOLE * 255),
    "grey of one channel": (HOLE * 255).astype(np.uint8),
    "grey of 16 bits": (HOLE * 65535).astype(np.uint16),
    "white strokes on a transparent layer": _rgba(_grey(HOLE * 255), HOLE),
    "a photograph with a transparent hole": _rgba(PHOTOGRAPH, ~HOLE),
    "black with a transparent hole": _rgba(_grey(HOLE * 0), ~HOLE),
    "white with a transparent hole": _rgba(_grey(HOLE * 0 + 255), ~HOLE),
    "white on black, opaque": _rgba(_grey(HOLE * 255), HOLE | True),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_what_is_white_or_transparent(tmp_path: Path, kind: str) -> None:
    mask = read_mask(_saved(tmp_path / "mask.png", MASKS[kind]))
    assert np.array_equal(mask.missing, HOLE)
    assert mask.by_transparency == ("transparent" in kind)


def test_a_mask_that_can_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    opaque = np.ones((16, 16), bool)
    opaque[0] = False
    path = _saved(tmp_path / "mask.png", _rgba(_grey(HOLE * 255), opaque))
    with pytest.raises(UserError, match="black, white and transparent"):
        read_mask(path)


def test_a_mask_has_the_size_of_its_pictures_or_of_the_model(tmp_path: Path) -> None:
    pictures = [(Path("a.png"), (32, 48)), (Path("b.png"), (32, 48))]
    drawn = np.zeros((32, 48), bool)
    drawn[10, 20] = True  # one pixel of four makes the model's pixel missing
    missing = fit_mask(Mask(drawn), size=16, pictures=pictures, label="--mask m")
    assert missing.shape == (1, 1, 16, 16)
    assert np.argwhere(missing).tolist() == [[0, 0, 5, 6]]
    own = fit_mask(Mask(HOLE), size=16, pictures=pictures, label="--mask m")
    assert np.array_equal(own[0, 0], HOLE)
    for shape in ((32, 32), (8, 8), (48, 32)):
        with pytest.raises(UserError, match=rf"--mask m: {shape[1]} x {shape[0]} pixels, a.png has 48 x 32"):
            fit_mask(Mask(np.ones(shape, bool)), size=16, pictures=pictures, label="--mask m")
    with pytest.raises(UserError, match="nothing is missing"):
        fit_mask(Mask(HOLE & False), size=16, pictures=pictures, label="--mask m")


def test_the_results_of_several_images_have_names_of_their_own() -> None:
    assert result_paths(Place("x/out.png"), 1) == [Place("x/out.png")]
    assert result_paths(Place("x/out.png"), 2) == [Place("x/out-1.png"), Place("x/out-2.png")]
