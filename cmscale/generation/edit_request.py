"""What `cmscale edit` is asked for: its request, the pictures that it works on, and where results go.

Nothing here needs torch, so that a mistake is found in less than a second.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmscale.errors import UserError
from cmscale.generation.edit_inputs import fit, fit_mask, fit_small, read_mask, read_picture
from cmscale.generation.task_settings import TaskSettings
from cmscale.io.place import Place


@dataclass(frozen=True, kw_only=True)
class EditRequest(TaskSettings):
    """The settings of `cmscale edit`.

    Attributes:
        mask, box: The missing pixels of `inpaint`; see `_missing`.
    """

    images: tuple[Path, ...]
    mask: Path | None = None
    box: str | None = None

    def check_number(self) -> None:
        """Raises UserError if the task works on another number of pictures."""
        if self.task == "interpolate" and len(self.images) not in (0, 2):
            raise UserError(f"edit interpolate: got {len(self.images)} images; give two, or none and --seed")
        if self.task != "interpolate" and not self.images:
            raise UserError(f"edit {self.task}: got no image; give at least one image file")


@dataclass(frozen=True)
class EditInputs:
    """The pictures of an edit at the size of the model.

    Attributes:
        pictures: uint8 [B, 3, H, W]; none for `interpolate` between samples.
        missing: The missing pixels of `inpaint`, bool [1, 1, H, W].
    """

    pictures: np.ndarray
    missing: np.ndarray


def read_inputs(request: EditRequest, *, size: int) -> EditInputs:
    """Reads the pictures and the mask of a request, for a model of `size` pixels.

    Raises:
        UserError: a picture, mask or box that does not fit.
    """
    read = [(path, read_picture(path).pixels) for path in request.images]
    if request.task == "superres":
        fitted = [fit_small(pixels, size=size, factor=request.factor, path=path) for path, pixels in read]
    else:
        fitted = [fit(pixels, size=size) for _, pixels in read]
    missing = np.zeros((1, 1, size, size), dtype=bool)
    if request.task == "inpaint":
        sizes = [(path, (pixels.shape[0], pixels.shape[1])) for path, pixels in read]
        missing = _missing(request, size=size, pictures=sizes)
    return EditInputs(np.stack(fitted) if fitted else np.empty((0, 3, size, size), np.uint8), missing)


def result_paths(out: Place, count: int) -> list[Place]:
    """The files of the results of `count` images: `out`, or if there are several NAME-1.png, NAME-2.png, ..."""
    if count == 1:
        return [out]
    name, dot, ending = out.rpartition(".")
    return [Place(f"{name}-{number}{dot}{ending}") for number in range(1, count + 1)]


def _missing(request: EditRequest, *, size: int, pictures: list[tuple[Path, tuple[int, int]]]) -> np.ndarray:
    """The missing pixels, bool [1, 1, size, size]: those of --mask, inside --box, or by default the centre."""
    if request.mask is not None and request.box is not None:
        raise UserError(f"edit inpaint: got --mask {request.mask} and --box {request.box}; give only one of them")
    if request.mask is not None:
        mask = read_mask(request.mask)
        if mask.by_transparency:
            print(f"--mask {request.mask}: {mask.rule}", file=sys.stderr, flush=True)
        return fit_mask(mask, size=size, pictures=pictures, label=f"--mask {request.mask}")
    left, top, right, bottom = _box(request.box or f"{size // 4},{size // 4},{size - size // 4},{size - size // 4}")
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise UserError(f"--box: got {request.box}; it must lie inside {size} x {size} pixels and not be empty")
    missing = np.zeros((1, 1, size, size), dtype=bool)
    missing[..., top:bottom, left:right] = True
    return missing


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box: got {text!r}; write LEFT,TOP,RIGHT,BOTTOM in pixels") from None
    return left, top, right, bottom
