"""The one decoder: grey of 16 bits, transparency, EXIF, frames and all formats by stated rules, or refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from cmscale.data.decode import decode, decode_into
from cmscale.io.image_files import image_formats
from cmscale.io.pictures import (
    FIRST_FRAME,
    FROM_CMYK,
    HIGH_BYTE,
    NOT_TURNED,
    ON_WHITE,
    TURNED,
    BadImage,
    decode_picture,
    read_header,
)

GRADIENT = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
RGB = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return decode_picture(data, exif="ignore").pixels


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("spread", [256, 257])
def test_grey_of_16_bits_maps_0_to_65535_onto_0_to_255(kind: str, spread: int) -> None:
    data = saved(Image.fromarray(GRADIENT.astype(np.uint16) * spread), kind)
    picture = decode_picture(data, exif="ignore")
    assert np.array_equal(picture.pixels, np.repeat(GRADIENT[..., None], 3, axis=-1))
    assert picture.decisions == (HIGH_BYTE,)


def test_big_endian_and_inverted_and_12_bit_tiffs_are_the_same_grey() -> None:
    expected = np.repeat(GRADIENT[..., None], 3, axis=-1)
    wide = GRADIENT.astype(np.uint16) * 257
    big = Image.fromarray(wide.astype(">u2"))
    assert np.array_equal(pixels(saved(big, "TIFF")), expected)
    inverted = bytearray(saved(Image.fromarray(65535 - wide), "TIFF", tiffinfo={262: 0}))
    assert np.array_equal(pixels(bytes(inverted)), expected)


@pytest.mark.parametrize(("mode", "words"), [("I", "32-bit or signed"), ("F", "floating-point")])
def test_pixels_without_a_stated_range_are_refused(mode: str, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        decode_picture(saved(Image.new(mode, (4, 4), 7), "TIFF"), exif="ignore")


def test_colour_of_16_bits_is_reduced_like_grey_and_says_so() -> None:
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    values = np.repeat((GRADIENT.astype(">u2") * 257)[..., None], 3, axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    picture = decode_picture(data, exif="ignore")
    assert np.array_equal(picture.pixels[..., 1], GRADIENT)
    assert picture.decisions == (HIGH_BYTE,)


def _with_hole(mode: str) -> Image.Image:
    """A dark image whose first row is transparent, in a mode with transparency."""
    rgba = np.dstack([RGB // 2, np.full(RGB.shape[:2], 255, np.uint8)])
    rgba[0, :, 3] = 0
    image = Image.fromarray(rgba)
    if mode == "P":
        palette = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (12, 1)) % 7 + 1, "P")
        palette.putpalette([40, 50, 60] * 8)
        first = np.asarray(palette).copy()
        first[0] = 0
        image = Image.fromarray(first, "P")
        image.putpalette([40, 50, 60] * 8)
        image.info["transparency"] = 0
    return image.convert(mode) if mode != "P" else image


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "WEBP")]
)
def test_transparency_is_composited_on_white_and_hides_no_colour(mode: str, kind: str) -> None:
    image = _with_hole(mode)
    how = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    if "transparency" in image.info:
        how["transparency"] = 0
    picture = decode_picture(saved(image, kind, **how), exif="ignore")
    assert (picture.pixels[0] == 255).all()
    opaque = np.asarray(image.convert("RGBA"))[1:, :, :3]
    assert np.array_equal(picture.pixels[1:], opaque)
    assert picture.decisions == (ON_WHITE,)


def test_half_transparency_is_mixed_and_full_opacity_decides_nothing() -> None:
    half = np.dstack([RGB, np.full(RGB.shape[:2], 128, np.uint8)])
    found = pixels(saved(Image.fromarray(half), "PNG")).astype(int)
    assert np.abs(found - (RGB * 128.0 + 255 * 127) / 255).max() <= 0.5
    opaque = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    picture = decode_picture(saved(Image.fromarray(opaque), "PNG"), exif="ignore")
    assert np.array_equal(picture.pixels, RGB)
    assert picture.decisions == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_applied_or_ignored_as_asked(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(RGB), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    applied, ignored = decode_picture(data, exif="apply"), decode_picture(data, exif="ignore")
    assert np.array_equal(applied.pixels, seen)
    assert np.array_equal(ignored.pixels, plain)
    assert applied.decisions == ((TURNED,) if orientation > 1 else ())
    assert ignored.decisions == ((NOT_TURNED,) if orientation > 1 else ())


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_frames_the_first_is_taken_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 10, 10), (10, 250, 10))]
    picture = decode_picture(saved(frames[0], kind, save_all=True, append_images=frames[1:]), exif="ignore")
    assert np.abs(picture.pixels.astype(int) - (250, 10, 10)).max() <= 8  # WebP and AVIF lose a little
    assert picture.decisions == (FIRST_FRAME,)


@pytest.mark.parametrize(
    "kind", ["BMP", "GIF", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000", "PCX", "SGI", "ICO", "DDS", "QOI"]
)
def test_what_pillow_reads_is_read(kind: str) -> None:
    image = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    found = pixels(saved(image, kind))
    assert found.shape == (16, 16, 3)
    assert np.abs(found.astype(int) - 200).max() <= 3  # AVIF loses a little


def test_formats_that_pillow_only_recognises_or_gives_to_a_program_are_refused() -> None:
    assert {"EPS", "HDF5", "MPEG"}.isdisjoint(image_formats())
    with pytest.raises(BadImage, match="no picture in a format that is read"):
        decode_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", exif="ignore")
    with pytest.raises(BadImage, match="starts with nothing"):
        decode_picture(b"", exif="ignore")


def test_cmyk_is_converted_and_said() -> None:
    data = saved(Image.new("CMYK", (16, 16), (0, 100, 200, 0)), "JPEG", quality=100)
    picture = decode_picture(data, exif="ignore")
    assert picture.decisions == (FROM_CMYK,)
    assert np.abs(picture.pixels.astype(int) - (255, 155, 55)).max() <= 2


def test_grey_and_black_and_white_and_palette_pictures_are_their_colours() -> None:
    for image in (Image.fromarray(GRADIENT), Image.fromarray(GRADIENT > 99), Image.fromarray(GRADIENT).convert("P")):
        expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(pixels(saved(image, "PNG")), expected)
    data = saved(Image.fromarray(GRADIENT), "JPEG")
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_damaged_files_are_bad_images_wherever_they_are_cut(kind: str) -> None:
    data = saved(Image.fromarray(RGB), kind)
    bad = 0
    for cut in range(0, len(data), max(1, len(data) // 40)):
        try:
            decode_picture(data[:cut], exif="apply")  # some formats draw what they have
        except BadImage:
            bad += 1
    assert bad > 4


def test_prepared_images_are_cropped_only_where_the_data_set_says_so() -> None:
    wide = saved(Image.fromarray(RGB), "PNG")
    assert np.array_equal(decode(wide), RGB)
    assert np.array_equal(decode(wide, side=12), RGB[:, 2:14])
    row = np.empty((12, 12, 3), np.uint8)
    with pytest.raises(BadImage, match="is 16x12, not 12x12"):
        decode_into(wide, row)
    decode_into(wide, row, crop=True)
    assert np.array_equal(row, RGB[:, 2:14])
    jpeg = saved(Image.fromarray(RGB), "JPEG")
    decode_into(jpeg, row, crop=True)
    assert np.array_equal(row, decode(jpeg)[:, 2:14])


def test_the_header_of_a_turned_tiff_states_the_size_that_its_pixels_have(tmp_path: Path) -> None:
    for kind, orientation, size in (("TIFF", 6, (5, 9)), ("TIFF", 1, (9, 5)), ("PNG", 6, (9, 5))):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        (tmp_path / "x").write_bytes(saved(Image.new("RGB", (9, 5)), kind, exif=exif))
        header = read_header(tmp_path / "x")
        assert (header.width, header.height) == size, (kind, orientation)
        height, width = pixels((tmp_path / "x").read_bytes()).shape[:2]
        assert (width, height) == size, (kind, orientation)
