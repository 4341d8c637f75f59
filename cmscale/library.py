"""Offers trained models to Python programs: `cmscale.load(...)` gives a model that samples and edits images.

Images come in as files, PIL images or tensors, and go out as PIL images, or as tensors on request.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor

from cmscale.commands.situation import WITHOUT_ANY_CONFIG
from cmscale.config import Config
from cmscale.config.sampling_times import check_descending, check_range
from cmscale.consistency.sampler import Sampler
from cmscale.consistency.solver import Denoise
from cmscale.distributed.world import choose_device
from cmscale.errors import UserError
from cmscale.generation.draw import SampleRequest, draw_samples
from cmscale.generation.given_images import File, Images, OneImage, as_pil, inputs_of, several
from cmscale.generation.tasks import TaskSettings, add_noise, apply_task, check_task, interpolated
from cmscale.io import image_tensors
from cmscale.runs.source_kind import kind_of_source
from cmscale.source import Source, load_source


def load(
    source: File,
    *,
    weights: str | None = None,
    step: int | None = None,
    config: File | None = None,
    overrides: Sequence[str] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> "Model":
    """Loads a trained model.

    Args:
        source: A run, a checkpoint, an exported file or folder, or weights of another project; local or s3://.
        weights: Name of an EMA, or `master` for the weights without averaging; the first EMA by default.
        step: Step of a run's checkpoint; the newest by default.
        config: Config file for weights that hold none.
        overrides: `key=value` overrides of that file.
        device: `auto` is a GPU if there is one.

    Raises:
        UserError: there is no such model, or a value does not fit it. The message says what to do.
    """
    chosen = choose_device(device)
    origin = os.fspath(source)
    if config is None and kind_of_source(origin) in WITHOUT_ANY_CONFIG:
        raise UserError(f"{origin}: holds weights without a config; give config=..., such as a file of configs/")
    settings = None if config is None else os.fspath(config)
    return Model(
        load_source(origin, weights=weights, step=step, config=settings, overrides=list(overrides)), device=chosen
    )


class Model:
    """A trained model in memory, ready to sample and edit; made by `load`.

    Every result depends on its arguments and the seed alone. Image i has noise of its own, of (seed, i).
    """

    def __init__(self, source: Source, *, device: torch.device) -> None:
        self._source = source
        self.device = device

    def __repr__(self) -> str:
        source = self._source
        return (
            f"<cmscale.Model {self.config.method.kind} {self.image_size} px, {source.weights_name} of step "
            f"{source.step}, {source.origin}>"
        )

    @property
    def config(self) -> Config:
        return self._source.config

    @property
    def step(self) -> int:
        """The step of training that the weights are of; 0 for weights of another project."""
        return self._source.step

    @property
    def weights(self) -> str:
        """The name of the weights: an EMA, `master`, or `imported`."""
        return self._source.weights_name

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.config.model.image_size

    @cached_property
    def denoiser(self) -> Denoise:
        """The denoiser D(x, sigma): images [B, 3, H, W] with noise of std sigma [B] -> clean images.

        For a consistency model it is the consistency function f.
        """
        return self._source.denoiser(self.device)

    @overload
    def sample(
        self,
        num: int = 1,
        *,
        steps: int | None = None,
        seed: int = 0,
        times: Sequence[float] | None = None,
        classes: Sequence[int] | Literal["random"] | None = None,
        sampler: Sampler | None = None,
        clip: bool = True,
        batch_size: int = 64,
        tensors: Literal[False] = False,
    ) -> list[Image.Image]: ...

    @overload
    def sample(
        self,
        num: int = 1,
        *,
        steps: int | None = None,
        seed: int = 0,
        times: Sequence[float] | None = None,
        classes: Sequence[int] | Literal["random"] | None = None,
        sampler: Sampler | None = None,
        clip: bool = True,
        batch_size: int = 64,
        tensors: Literal[True],
    ) -> Tensor: ...

    def sample(
        self,
        num: int = 1,
        *,
        steps: int | None = None,
        seed: int = 0,
        times: Sequence[float] | None = None,
        classes: Sequence[int] | Literal["random"] | None = None,
        sampler: Sampler | None = None,
        clip: bool = True,
        batch_size: int = 64,
        tensors: bool = False,
    ) -> list[Image.Image] | Tensor:
        """Draws samples: those of `cmscale sample`, up to the rounding of several threads on a CPU.

        Args:
            num: Number of samples.
            steps: Sampling steps; by default 1, or the config's for a diffusion model.
            times: Descending noise levels, in place of `steps`.
            classes: For class-conditional models: classes that are taken in turn, or `random`.
            sampler: `heun` (the default), `euler`, `dpm2` or `ancestral`; for diffusion models alone.
            clip: Clamps every estimate to [-1, 1], as the released code does.
            batch_size: Samples that are drawn at once.
            tensors: Return a float tensor [num, 3, H, W] in place of PIL images.

        Returns:
            A list of PIL images, or a tensor.

        Raises:
            UserError: a value that this model does not use or that is outside of its range.
        """
        if num < 1 or batch_size < 1 or (steps is not None and steps < 1) or seed < 0:
            raise UserError(
                f"sample: got num {num}, batch_size {batch_size}, steps {steps}, seed {seed}; the first three are at "
                f"least 1, the seed at least 0"
            )
        if steps is not None and times is not None:
            raise UserError("sample: steps has no effect beside times; give one of them")
        if sampler is not None and self.config.method.facts.sampler != "ode":
            raise UserError(f"sampler: {sampler} has no effect on a consistency model; leave it out")
        request = SampleRequest(
            num=num,
            steps=steps,
            seed=seed,
            sampler=sampler or "heun",
            clip=clip,
            batch_size=batch_size,
            sigmas=None if times is None else self._times(times),
            classes=classes if classes is None or isinstance(classes, str) else tuple(classes),
        )
        images = draw_samples(self._source, request, device=self.device, denoise=self.denoiser)
        return images if tensors else as_pil(image_tensors.to_uint8(images))

    def inpaint(self, image: Images, mask: Any, *, steps: int = 40, seed: int = 0, tensors: bool = False) -> Any:
        """Fills the missing pixels of images; all others stay as they are.

        Args:
            mask: What is missing: a file or PIL image that is white or transparent there, or a bool array [H, W] that
                is true there; of the size of the images or of the model.
            steps: Number of times of the grid (Consistency Models, algorithm 4).
            tensors: Return float tensors in place of PIL images; one tensor [3, H, W] for one image.

        Raises:
            UserError: an image or the mask can't be used, or the model is no unconditional consistency model.
        """
        settings = TaskSettings(task="inpaint", steps=steps, seed=seed)
        return self._edit(settings, image, mask=mask, tensors=tensors)

    def colorize(self, image: Images, *, steps: int = 40, seed: int = 0, tensors: bool = False) -> Any:
        """Colours images, of which only the luminance is used; it stays the same. See `inpaint` for the rest."""
        return self._edit(TaskSettings(task="colorize", steps=steps, seed=seed), image, tensors=tensors)

    def superres(self, image: Images, *, factor: int = 8, steps: int = 40, seed: int = 0, tensors: bool = False) -> Any:
        """Adds detail to images, of which only the means of factor x factor pixels are used; they stay the same.

        An image that is smaller than the model's gives these means itself. See `inpaint` for the rest.
        """
        settings = TaskSettings(task="superres", factor=factor, steps=steps, seed=seed)
        return self._edit(settings, image, tensors=tensors)

    def stroke(self, image: Images, *, seed: int = 0, tensors: bool = False) -> Any:
        """Turns stroke paintings into photographs (SDEdit). See `inpaint` for the rest."""
        return self._edit(TaskSettings(task="stroke", seed=seed), image, tensors=tensors)

    def denoise(self, image: Images, *, sigma: float, seed: int | None = None, tensors: bool = False) -> Any:
        """Removes Gaussian noise of standard deviation `sigma`, for values in [-1, 1], from images.

        Args:
            seed: Adds the noise of this seed first, as `cmscale edit denoise` does; None: the images are noisy.
        """
        settings = TaskSettings(task="denoise", sigma=sigma, seed=seed or 0)
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

    def interpolate(
        self,
        first: OneImage | None = None,
        second: OneImage | None = None,
        *,
        count: int = 8,
        seed: int = 0,
        tensors: bool = False,
    ) -> list[Image.Image] | Tensor:
        """`count` images from one image to another, or between two samples of the seed if none are given."""
        settings = TaskSettings(task="interpolate", count=count, seed=seed)
        self._check(settings)
        if (first is None) != (second is None):
            raise UserError("interpolate: got one image; give two, or none and a seed")
        ends = None
        if first is not None and second is not None:
            ends, _, _ = inputs_of(settings, [first, second], mask=None, shape=self._source.image_shape)
            ends = ends.to(self.device)
        images = interpolated(self._source, self.denoiser, settings, ends=ends, device=self.device).cpu().clamp(-1, 1)
        return images if tensors else as_pil(image_tensors.to_uint8(images))

    def _times(self, times: Sequence[float]) -> Tensor:
        values = tuple(float(time) for time in times)
        try:
            check_descending(values, shown=str(list(values)))
        except ValueError as error:
            raise UserError(f"times: {error}") from None
        check_range(values, self.config.method, label=f"times {list(values)}")
        return torch.tensor(values, dtype=torch.float64)

    def _check(self, settings: TaskSettings) -> None:
        check_task(self._source, settings)
        if settings.steps < 2 or settings.count < 2 or settings.seed < 0:
            raise UserError(
                f"{settings.task}: got steps {settings.steps}, count {settings.count}, seed {settings.seed}; steps and "
                f"count are at least 2, the seed at least 0"
            )

    def _edit(
        self, settings: TaskSettings, given: Images, *, mask: Any = None, tensors: bool, noisy: bool = True
    ) -> Any:
        self._check(settings)
        sequence = several(given)
        images, missing, is_single = inputs_of(
            settings, [given] if sequence is None else sequence, mask=mask, shape=self._source.image_shape
        )
        images = images.to(self.device)
        if settings.task == "denoise" and not noisy:
            images = add_noise(images, settings)
        _, result = apply_task(self._source, self.denoiser, settings, images, missing)
        result = result.cpu()
        edited: Any = result if tensors else as_pil(image_tensors.to_uint8(result, nearest=True))
        return edited[0] if sequence is None and is_single else edited
