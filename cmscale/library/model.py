"""Offers trained models to Python programs: `cmscale.load(...)` gives a model that samples and edits images.

Images come in as files, PIL images or tensors, and go out as PIL images, or as tensors on request.
"""

import os
from collections.abc import Sequence
from typing import Literal, overload

import torch
from PIL import Image
from torch import Tensor

from cmscale.commands.situation import WITHOUT_ANY_CONFIG
from cmscale.config import Config
from cmscale.config.sampling_times import check_descending, check_range
from cmscale.consistency.sampler import Sampler
from cmscale.distributed.world import choose_device
from cmscale.errors import UserError
from cmscale.generation.draw import SampleRequest, draw_samples
from cmscale.generation.given_images import File, as_pil
from cmscale.io import image_tensors
from cmscale.library.editing import Editor
from cmscale.runs.source_kind import kind_of_source
from cmscale.source import load_source


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


class Model(Editor):
    """A trained model in memory, ready to sample and edit; made by `load`.

    Every result depends on its arguments and the seed alone. Image i has noise of its own, of (seed, i).
    """

    def __repr__(self) -> str:
        source = self._source
        return (
            f"<cmscale.Model {self.config.method.kind} {self.image_size} px, {source.weights_name} of step "
            f"{source.step}, {source.origin}>"
        )

    @property
    def config(self) -> Config:
        """The config that the model was trained with."""
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

    def _times(self, times: Sequence[float]) -> Tensor:
        values = tuple(float(time) for time in times)
        try:
            check_descending(values, shown=str(list(values)))
        except ValueError as error:
            raise UserError(f"times: {error}") from None
        check_range(values, self.config.method, label=f"times {list(values)}")
        return torch.tensor(values, dtype=torch.float64)
