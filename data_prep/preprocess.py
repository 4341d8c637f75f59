"""Owns what happens to an image on its way into a data set: crop, resize, encode."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from cmscale.data.decode import BadImage, decode

RECIPES = {
    "adm": "shorter side to SIZE with a box filter, then centre crop (ADM's LSUN script)",
    "edm": "centre crop to a square, then Lanczos to SIZE (StyleGAN's and EDM's dataset tools)",
}
ENCODINGS = {
    "jpeg": "JPEG, quality 95, 4:4:4",
    "png": "PNG",
    "webp": "WebP, lossless",
}


def convert(data: bytes, *, size: int, preprocess: str, encoding: str) -> bytes:
    """Encoded image in, encoded square of `size` px out. Raises BadImage, also for one smaller than the
    crop."""
    return encode(crop(decode(data), size=size, preprocess=preprocess), encoding=encoding)


def crop(image: np.ndarray, *, size: int, preprocess: str) -> np.ndarray:
    """RGB uint8 [H, W, 3] -> [size, size, 3] by the recipe. Raises BadImage where it would have to
    enlarge."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter < size:
        raise BadImage(f"{width}x{height} is smaller than the crop of {size} px")
    if preprocess == "adm":
        if shorter != size:
            shape = (round(width * size / shorter), round(height * size / shorter))
            image = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BOX))
        return _centre(image, size)
    square = _centre(image, shorter)
    if shorter == size:
        return square
    resized = Image.fromarray(np.ascontiguousarray(square)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    top = (image.shape[0] - size) // 2
    left = (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def encode(image: np.ndarray, *, encoding: str) -> bytes:
    """RGB uint8 [H, W, 3] -> bytes in the encoding."""
    image = np.ascontiguousarray(image)
    if encoding == "jpeg":
        return simplejpeg.encode_jpeg(image, quality=95, colorspace="RGB", colorsubsampling="444")
    file = io.BytesIO()
    if encoding == "png":
        Image.fromarray(image).save(file, "png")
    else:
        Image.fromarray(image).save(file, "webp", lossless=True, exact=True)
    return file.getvalue()
