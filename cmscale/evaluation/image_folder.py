"""Reads a folder of finished images for an evaluation, and says what was counted, left out, and decided."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cmscale.errors import UserError
from cmscale.io.counting import counted
from cmscale.io.image_files import image_suffixes, list_files, printable
from cmscale.io.pictures import BadImage, decode_picture, read_header


class ImageFolder:
    """The images below a folder, of one size, in the order of their paths; hidden files are no images.

    Attributes:
        count: Number of images.
        height, width: Their size in pixels.
        formats: Pillow's names of their formats, and how many images have each.

    Raises:
        UserError: no images, images of different sizes, or a file or folder that can't be read.
    """

    def __init__(self, path: Path) -> None:
        listing = list_files(path, image_suffixes())
        self._path = path
        self._left_out = listing.left_out
        for name, reason in listing.lost.items():
            self._left_out.add(reason, name)
        if not listing.files:
            besides = f", only {self._left_out}" if self._left_out else ""
            raise UserError(f"{path}: no images there{besides}")
        self._names = sorted(listing.files, key=lambda name: name.split("/"))
        self.count = len(self._names)
        self.formats: Counter[str] = Counter()
        self.height, self.width = self._one_size()
        self._decisions: Counter[str] = Counter()
        self._lossy: Counter[str] = Counter()

    def _one_size(self) -> tuple[int, int]:
        """The height and width of all images, by their headers: a stray one is found before the others are measured."""
        size = None
        for name in counted(self._names, f"{self._path}: reading sizes", total=self.count):
            with self._explained(name):
                header = read_header(self._path / name)
            self.formats[header.format] += 1
            found = header.height, header.width
            size = size or found
            if found != size:
                raise UserError(
                    f"{self._path}: images of different sizes: {printable(name)} has {found[0]} x {found[1]} pixels "
                    f"(height x width), {printable(self._names[0])} {size[0]} x {size[1]}; an evaluation needs one size"
                )
        assert size is not None, "there are images"
        return size

    def read(self) -> Iterator[np.ndarray]:
        """The images, uint8 [H, W, 3], with one in memory. EXIF orientations are ignored, as ADM's evaluator does."""
        self._decisions.clear()
        self._lossy.clear()
        for name in self._names:
            with self._explained(name):
                picture = decode_picture((self._path / name).read_bytes(), exif="ignore")
            self._decisions.update(picture.decisions)
            if picture.is_lossy:
                self._lossy[picture.format] += 1
            yield picture.pixels

    def notes(self) -> list[str]:
        """What a result should say about the images, one line each; complete once they have been read."""
        notes = []
        if self._left_out:
            notes.append(f"{self._path}: {self.count} images counted; left out: {self._left_out}")
        if self._lossy:
            named = ", ".join(f"{count} {name}" for name, count in sorted(self._lossy.items()))
            notes.append(
                f"{self._path}: {named} of {self.count} images are stored with loss, which changes the metrics; "
                f"compare images that are stored without loss (PNG)"
            )
        for decision, count in sorted(self._decisions.items()):
            notes.append(f"{self._path}: {count} of {self.count} images: {decision}")
        return notes

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except BadImage as error:
            raise UserError(f"{self._path}/{printable(name)}: not an image that can be read ({error})") from None
        except OSError as error:
            raise UserError(f"{self._path}/{printable(name)}: can't be read ({error.strerror})") from None
