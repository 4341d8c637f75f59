"""Hashes the pixels of images in order, whatever files they are in."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np


class PixelHash:
    """The SHA-256 of images in order: of their pixels, and of their size unless they are square."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._is_begun = False

    def add(self, images: np.ndarray) -> None:
        """Adds uint8 images [..., 3, H, W]."""
        height, width = images.shape[-2:]
        if not self._is_begun and height != width:
            self._digest.update(f"{height} x {width}".encode())
        self._is_begun = True
        self._digest.update(np.ascontiguousarray(images).data)

    def passing(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The images [H, W, 3], each added when it is taken."""
        for image in images:
            self.add(image.transpose(2, 0, 1))
            yield image

    def hexdigest(self) -> str:
        """The hash of all pixels so far, in hexadecimal."""
        return self._digest.hexdigest()
