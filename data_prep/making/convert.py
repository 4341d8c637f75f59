"""Converts an image into a data set's sample: decodes, crops, resizes and encodes it."""

import io
from typing import assert_never

import numpy as np
import simplejpeg
from PIL import Image

from cmscale.data.decode import BadImage, decode
from cmscale.runs.manifests import Encoding, Preprocess

RECIPES: dict[Preprocess, str] = {
    "adm": "shorter side to SIZE with a box filter, then centre crop (ADM's LSUN script)",
    "edm": "centre crop to a square, then Lanczos to SIZE (StyleGAN's and EDM's dataset tools)",
}
ENCODINGS: dict[Encoding, str] = {
    "jpeg": "JPEG, quality 95, 4:4:4",
    "png": "PNG",
    "webp": "WebP, lossless",
}


def convert(data: bytes, *, size: int, preprocess: Preprocess, encoding: Encoding) -> bytes:
    """Converts an encoded image to an encoded square of `size` px.

    Raises:
        BadImage: the image cannot be decoded, or is smaller than the crop.
    """
    return encode(crop(decode(data), size=size, preprocess=preprocess), encoding=encoding)


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
            return _centre_crop(image, size)
        case "edm":
            square = _centre_crop(image, shorter)
            if shorter == size:
                return square
            resized = Image.fromarray(np.ascontiguousarray(square)).resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(resized)
    assert_never(preprocess)


def _centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    top = (image.shape[0] - size) // 2
    left = (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def encode(image: np.ndarray, *, encoding: Encoding) -> bytes:
    """Encodes RGB uint8 [H, W, 3] with the settings of `ENCODINGS`."""
    image = np.ascontiguousarray(image)
    file = io.BytesIO()
    match encoding:
        case "jpeg":
            return simplejpeg.encode_jpeg(image, quality=95, colorspace="RGB", colorsubsampling="444")
        case "png":
            Image.fromarray(image).save(file, "png")
        case "webp":
            Image.fromarray(image).save(file, "webp", lossless=True, exact=True)
        case _:
            assert_never(encoding)
    return file.getvalue()
