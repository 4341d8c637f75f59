"""Converts a picture into a data set's sample: decodes, crops, resizes and encodes it."""

import io
from collections.abc import Callable
from typing import assert_never

import numpy as np
import simplejpeg
from PIL import Image

from cmscale.data.decode import EXTENSIONS, centre_crop
from cmscale.io.image_files import Exif
from cmscale.io.pictures import NOT_TURNED, BadImage, Picture, decode_picture
from cmscale.runs.manifests import Encoding, Preprocess

RECIPES: dict[Preprocess, str] = {
    "adm": "shorter side to SIZE with a box filter, then centre crop (ADM's LSUN script)",
    "edm": "centre crop to a square, then Lanczos to SIZE (StyleGAN's and EDM's dataset tools)",
}
RECIPE_EXIF: dict[Preprocess, Exif] = {"adm": "ignore", "edm": "apply"}
"""What the tool that a recipe is named after does with EXIF orientations: EDM's reads an LMDB with OpenCV."""
DEFAULT_ENCODING: Encoding = "png"
ENCODINGS: dict[Encoding, str] = {
    "jpeg": "JPEG, quality 95, 4:4:4",
    "png": "PNG",
    "webp": "WebP, lossless",
    "keep": "the bytes of the source where an image needs no resizing (its centre is cropped when it is read), "
    "else PNG",
}
AS_IT_CAME = "stored byte for byte"


def convert(
    data: bytes,
    *,
    size: int,
    preprocess: Preprocess,
    encoding: Encoding,
    exif: Exif = "ignore",
    note: Callable[[str], None] = lambda _: None,
) -> bytes:
    """Converts an encoded picture to an encoded square of `size` px.

    Args:
        note: Called with every decision that the picture needed (`cmscale.io.pictures`), and with AS_IT_CAME.

    Raises:
        BadImage: the picture cannot be decoded, or is smaller than the crop.
    """
    picture = decode_picture(data, exif=exif)
    for decision in picture.decisions:
        note(decision)
    if encoding == "keep" and _fits(picture, size=size):
        note(AS_IT_CAME)
        return data
    return encode(crop(picture.pixels, size=size, preprocess=preprocess), encoding=encoding)


def _fits(picture: Picture, *, size: int) -> bool:
    """Whether the reader of a data set gets the sample's pixels from the picture's own bytes by cropping its centre."""
    plain = set(picture.decisions) <= {NOT_TURNED}
    return plain and picture.format.lower() in EXTENSIONS and min(picture.pixels.shape[:2]) == size


def crop(image: np.ndarray, *, size: int, preprocess: Preprocess) -> np.ndarray:
    """Crops and resizes RGB uint8 [H, W, 3] to [size, size, 3] by a recipe of `RECIPES`.

    Raises:
        BadImage: the image would have to be enlarged.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter < size:
        raise BadImage(f"{width}x{height} is smaller than the crop of {size} px")
    match preprocess:
        case "adm":
            if shorter != size:
                shape = (round(width * size / shorter), round(height * size / shorter))
                image = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BOX))
            return centre_crop(image, size)
        case "edm":
            square = centre_crop(image, shorter)
            if shorter == size:
                return square
            resized = Image.fromarray(np.ascontiguousarray(square)).resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(resized)
    assert_never(preprocess)


def encode(image: np.ndarray, *, encoding: Encoding) -> bytes:
    """Encodes RGB uint8 [H, W, 3] with the settings of `ENCODINGS`."""
    image = np.ascontiguousarray(image)
    file = io.BytesIO()
    match encoding:
        case "jpeg":
            return simplejpeg.encode_jpeg(image, quality=95, colorspace="RGB", colorsubsampling="444")
        case "png" | "keep":
            Image.fromarray(image).save(file, "png")
        case "webp":
            Image.fromarray(image).save(file, "webp", lossless=True, exact=True)
        case _:
            assert_never(encoding)
    return file.getvalue()
