"""Edits images with a model that Python programs have loaded: the methods of `cmscale.Model` that take images.

The result follows the images: one file or PIL image gives a PIL image, several give a list, and `tensors=True` gives a
tensor. A tensor may be one image [3, H, W] or several [N, 3, H, W], an array [H, W, 3] or [N, H, W, 3].
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, overload

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmscale.config import Config
from cmscale.consistency.solver import Denoise
from cmscale.errors import UserError
from cmscale.generation.given_images import File, Images, Missing, OneImage, as_pil, inputs_of, several
from cmscale.generation.task_settings import TaskSettings, check_task
from cmscale.generation.tasks import add_noise, apply_task, interpolated
from cmscale.io import image_tensors
from cmscale.library.arguments import explained_as_arguments, number, truth, whole_number
from cmscale.library.surroundings import own_surroundings
from cmscale.source import Source

Picture = File | Image.Image
Array = Tensor | NDArray[Any]
Pictures = Image.Image | list[Image.Image]


class Editor:
    """A model with the zero-shot tasks of an unconditional consistency model."""

    def __init__(self, source: Source, *, device: torch.device) -> None:
        self._source = source
        self._device = device

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: not the network, which is made anew of the weights."""
        return {name: value for name, value in self.__dict__.items() if name != "denoiser"}

    @property
    def device(self) -> torch.device:
        """Where the model computes; `cmscale.load(..., device=...)` chooses it."""
        return self._device

    @property
    def config(self) -> Config:
        """The config that the model was trained with."""
        return self._source.config

    @cached_property
    def denoiser(self) -> Denoise:
        """The denoiser D(x, sigma): images [B, 3, H, W] with noise of std sigma [B] -> clean images.

        For a consistency model it is the consistency function f.
        """
        with own_surroundings():
            return self._source.denoiser(self.device)

    @overload
    def inpaint(
        self, image: Picture, mask: Missing, *, steps: int = 40, seed: int = 0, tensors: Literal[False] = False
    ) -> Image.Image: ...
    @overload
    def inpaint(
        self,
        image: Sequence[OneImage],
        mask: Missing,
        *,
        steps: int = 40,
        seed: int = 0,
        tensors: Literal[False] = False,
    ) -> list[Image.Image]: ...
    @overload
    def inpaint(
        self,
        image: Array,
        mask: Missing,
        *,
        steps: int = 40,
        seed: int = 0,
        tensors: Literal[False] = False,
    ) -> Pictures: ...
    @overload
    def inpaint(
        self, image: Images, mask: Missing, *, steps: int = 40, seed: int = 0, tensors: Literal[True]
    ) -> Tensor: ...
    @explained_as_arguments
    @own_surroundings()
    def inpaint(
        self, image: Images, mask: Missing, *, steps: int = 40, seed: int = 0, tensors: bool = False
    ) -> Pictures | Tensor:
        """Fills the missing pixels of images; all others stay as they are.

        Args:
            image: A file (also s3://), a PIL image, an array uint8 [H, W, 3], or a float tensor [3, H, W] in [-1, 1]
                that has the model's size, to which all others are cropped and resized; or several: a list of these, an
                array [N, H, W, 3], or a tensor [N, 3, H, W].
            mask: What is missing: a file or PIL image that is white or transparent there, or a bool array [H, W] or
                [1, ..., H, W] that is true there; of the size of the images or of the model.
            steps: Number of times of the grid (Consistency Models, algorithm 4).
            seed: Of the noise. Each of several images has noise of its own.
            tensors: Return float tensors in place of PIL images; one tensor [3, H, W] for one image.

        Returns:
            A PIL image for one image, a list of them for several, or a tensor.

        Raises:
            UserError: an image or the mask can't be used, or the model is no unconditional consistency model.
        """
        settings = TaskSettings(task="inpaint", steps=_steps(steps), seed=_seed(seed))
        return self._edit(settings, image, mask=mask, tensors=tensors)

    @overload
    def colorize(
        self, image: Picture, *, steps: int = 40, seed: int = 0, tensors: Literal[False] = False
    ) -> Image.Image: ...
    @overload
    def colorize(
        self, image: Sequence[OneImage], *, steps: int = 40, seed: int = 0, tensors: Literal[False] = False
    ) -> list[Image.Image]: ...
    @overload
    def colorize(
        self, image: Array, *, steps: int = 40, seed: int = 0, tensors: Literal[False] = False
    ) -> Pictures: ...
    @overload
    def colorize(self, image: Images, *, steps: int = 40, seed: int = 0, tensors: Literal[True]) -> Tensor: ...
    @explained_as_arguments
    @own_surroundings()
    def colorize(self, image: Images, *, steps: int = 40, seed: int = 0, tensors: bool = False) -> Pictures | Tensor:
        """Colours images, of which only the luminance is used; it stays the same. See `inpaint` for the rest."""
        settings = TaskSettings(task="colorize", steps=_steps(steps), seed=_seed(seed))
        return self._edit(settings, image, tensors=tensors)

    @overload
    def superres(
        self, image: Picture, *, factor: int = 8, steps: int = 40, seed: int = 0, tensors: Literal[False] = False
    ) -> Image.Image: ...
    @overload
    def superres(
        self,
        image: Sequence[OneImage],
        *,
        factor: int = 8,
        steps: int = 40,
        seed: int = 0,
        tensors: Literal[False] = False,
    ) -> list[Image.Image]: ...
    @overload
    def superres(
        self,
        image: Array,
        *,
        factor: int = 8,
        steps: int = 40,
        seed: int = 0,
        tensors: Literal[False] = False,
    ) -> Pictures: ...
    @overload
    def superres(
        self, image: Images, *, factor: int = 8, steps: int = 40, seed: int = 0, tensors: Literal[True]
    ) -> Tensor: ...
    @explained_as_arguments
    @own_surroundings()
    def superres(
        self, image: Images, *, factor: int = 8, steps: int = 40, seed: int = 0, tensors: bool = False
    ) -> Pictures | Tensor:
        """Adds detail to images, of which only the means of factor x factor pixels are used; they stay the same.

        An image that is smaller than the model's gives these means itself. See `inpaint` for the rest.
        """
        patch = whole_number("factor", factor, least=2)
        settings = TaskSettings(task="superres", factor=patch, steps=_steps(steps), seed=_seed(seed))
        return self._edit(settings, image, tensors=tensors)

    @overload
    def stroke(self, image: Picture, *, seed: int = 0, tensors: Literal[False] = False) -> Image.Image: ...
    @overload
    def stroke(
        self, image: Sequence[OneImage], *, seed: int = 0, tensors: Literal[False] = False
    ) -> list[Image.Image]: ...
    @overload
    def stroke(self, image: Array, *, seed: int = 0, tensors: Literal[False] = False) -> Pictures: ...
    @overload
    def stroke(self, image: Images, *, seed: int = 0, tensors: Literal[True]) -> Tensor: ...
    @explained_as_arguments
    @own_surroundings()
    def stroke(self, image: Images, *, seed: int = 0, tensors: bool = False) -> Pictures | Tensor:
        """Turns stroke paintings into photographs (SDEdit). See `inpaint` for the rest."""
        return self._edit(TaskSettings(task="stroke", seed=_seed(seed)), image, tensors=tensors)

    @overload
    def denoise(
        self, image: Picture, *, sigma: float, seed: int | None = None, tensors: Literal[False] = False
    ) -> Image.Image: ...
    @overload
    def denoise(
        self, image: Sequence[OneImage], *, sigma: float, seed: int | None = None, tensors: Literal[False] = False
    ) -> list[Image.Image]: ...
    @overload
    def denoise(
        self, image: Array, *, sigma: float, seed: int | None = None, tensors: Literal[False] = False
    ) -> Pictures: ...
    @overload
    def denoise(self, image: Images, *, sigma: float, seed: int | None = None, tensors: Literal[True]) -> Tensor: ...
    @explained_as_arguments
    @own_surroundings()
    def denoise(
        self, image: Images, *, sigma: float, seed: int | None = None, tensors: bool = False
    ) -> Pictures | Tensor:
        """Removes Gaussian noise of standard deviation `sigma`, for values in [-1, 1], from images.

        Args:
            seed: Adds the noise of this seed first, as `cmscale edit denoise` does; None: the images are noisy.
        """
        settings = TaskSettings(task="denoise", sigma=number("sigma", sigma), seed=0 if seed is None else _seed(seed))
        return self._edit(settings, image, tensors=tensors, noisy=seed is None)

    @overload
    def interpolate(
        self,
        first: OneImage | None = None,
        second: OneImage | None = None,
        *,
        count: int = 8,
        seed: int = 0,
        tensors: Literal[False] = False,
    ) -> list[Image.Image]: ...

    @overload
    def interpolate(
        self,
        first: OneImage | None = None,
        second: OneImage | None = None,
        *,
        count: int = 8,
        seed: int = 0,
        tensors: Literal[True],
    ) -> Tensor: ...

    @explained_as_arguments
    @own_surroundings()
    def interpolate(
        self,
        first: OneImage | None = None,
        second: OneImage | None = None,
        *,
        count: int = 8,
        seed: int = 0,
        tensors: bool = False,
    ) -> list[Image.Image] | Tensor:
        """`count` images from one image to another, or between two samples of the seed if none are given.

        The noise that gives an image is searched by hundreds of gradient steps: seconds to minutes for two images.
        """
        settings = TaskSettings(task="interpolate", count=whole_number("count", count, least=2), seed=_seed(seed))
        truth("tensors", tensors)
        self._check(settings)
        if (first is None) != (second is None):
            raise UserError("interpolate: got one image; give two, or none and a seed")
        ends = None
        if first is not None and second is not None:
            ends, _, _ = inputs_of(settings, [first, second], mask=None, shape=self._source.image_shape)
            if len(ends) != 2:
                raise UserError("interpolate: a tensor of several images; give one image for each end, [3, H, W]")
            ends = ends.to(self.device)
        images = interpolated(self._source, self.denoiser, settings, ends=ends, device=self.device).cpu().clamp(-1, 1)
        return images if tensors else as_pil(image_tensors.to_uint8(images))

    def _check(self, settings: TaskSettings) -> None:
        check_task(self.config, settings, origin=self._source.origin)

    def _edit(
        self, settings: TaskSettings, given: Images, *, mask: Missing | None = None, tensors: bool, noisy: bool = True
    ) -> Pictures | Tensor:
        truth("tensors", tensors)
        self._check(settings)
        pictures, is_sequence = several(given)
        images, missing, is_single = inputs_of(settings, pictures, mask=mask, shape=self._source.image_shape)
        images = images.to(self.device)
        if settings.task == "denoise" and not noisy:
            images = add_noise(images, settings)
        _, result = apply_task(self._source, self.denoiser, settings, images, missing)
        result = result.cpu()
        edited = result if tensors else as_pil(image_tensors.to_uint8(result, nearest=True))
        return edited[0] if is_single and not is_sequence else edited


def _steps(steps: object) -> int:
    return whole_number("steps", steps, least=2)


def _seed(seed: object) -> int:
    return whole_number("seed", seed, least=0)
