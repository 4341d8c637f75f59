"""Offers trained models to Python programs: `cmscale.load(...)` gives a model that samples and edits images.

Images come in as files, PIL images, arrays or tensors, and go out as PIL images, or as tensors on request.
"""

from collections.abc import Sequence
from typing import Literal, get_args, overload

import torch
from PIL import Image
from torch import Tensor

from cmscale.commands.situation import RUN, WITH_WEIGHTS_TO_CHOOSE, WITHOUT_ANY_CONFIG
from cmscale.commands.use import Use
from cmscale.config import Config
from cmscale.config.sampling_times import check_descending, check_range
from cmscale.consistency.sampler import Sampler
from cmscale.distributed.world import choose_device
from cmscale.errors import UserError
from cmscale.generation.draw import SampleRequest, draw_samples
from cmscale.generation.given_images import File, as_pil
from cmscale.io import image_tensors
from cmscale.library.arguments import (
    explained_as_arguments,
    in_order,
    numbers,
    one_of,
    path,
    text,
    truth,
    whole_number,
)
from cmscale.library.editing import Array, Editor
from cmscale.library.surroundings import own_surroundings
from cmscale.runs.source_kind import kind_of_source
from cmscale.source import load_source

_CLASSES = "a list of class numbers, or 'random'"


@explained_as_arguments
@own_surroundings()
def load(
    source: File,
    *,
    weights: str | None = None,
    step: int | None = None,
    config: File | None = None,
    overrides: Sequence[str] = (),
    device: str | torch.device = "auto",
) -> "Model":
    """Loads a trained model.

    Args:
        source: A run, a checkpoint, an exported file or folder, or weights of another project; local or s3://.
        weights: Of a run or checkpoint: the name of an EMA, or `master` for the weights without averaging; the first
            EMA by default.
        step: Step of a run's checkpoint; the newest by default.
        config: Config file for weights that hold none.
        overrides: `key=value` overrides of that file.
        device: `cpu`, `cuda`, `cuda:N` or a torch.device; `auto` is a GPU if there is one.

    Raises:
        UserError: there is no such model, or a value does not fit it. The message says what to do.
    """
    chosen = _device(device)
    origin = path("source", source)
    settings = None if config is None else path("config", config)
    if weights is not None:
        text("weights", weights)
    if step is not None:
        step = whole_number("step", step, least=0)
    changes = [] if overrides == () else in_order("overrides", overrides, "a list of key=value")
    for override in changes:
        text("overrides", override)
    if settings is None and changes:
        raise UserError("overrides: have no effect without config=...; leave them out")
    kind = kind_of_source(origin)
    if settings is None and kind in WITHOUT_ANY_CONFIG:
        raise UserError(f"{origin}: holds weights without a config; give config=..., such as a file of configs/")
    for name, given, kinds in (("weights", weights, WITH_WEIGHTS_TO_CHOOSE), ("step", step, (RUN,))):
        if given is not None and (why := Use(source=kinds).why_unused({"source": kind})):
            raise UserError(f"{name}: {why}; leave it out")
    found = load_source(origin, weights=weights, step=step, config=settings, overrides=changes)
    return Model(found, device=chosen)


def _device(named: str | torch.device) -> torch.device:
    if named == "auto":
        return choose_device("auto")
    try:
        device = torch.device(named)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device: got {named!r}; give auto, cpu, cuda, cuda:N or a torch.device of these")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device: got {str(device)!r}, and this machine has {count} CUDA devices; give another one")
    return device


class Model(Editor):
    """A trained model in memory, ready to sample and edit; made by `load`.

    Every result depends on its arguments and the seed alone. Image i has noise of its own, of (seed, i). Which kernels
    torch uses is left to the program: its threads, TF32 and the like change a result by their rounding.
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
        times: Sequence[float] | Array | None = None,
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
        times: Sequence[float] | Array | None = None,
        classes: Sequence[int] | Literal["random"] | None = None,
        sampler: Sampler | None = None,
        clip: bool = True,
        batch_size: int = 64,
        tensors: Literal[True],
    ) -> Tensor: ...

    @explained_as_arguments
    @own_surroundings()
    def sample(
        self,
        num: int = 1,
        *,
        steps: int | None = None,
        seed: int = 0,
        times: Sequence[float] | Array | None = None,
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
        num = whole_number("num", num, least=1)
        batch_size = whole_number("batch_size", batch_size, least=1)
        seed = whole_number("seed", seed, least=0)
        truth("clip", clip)
        truth("tensors", tensors)
        if steps is not None:
            steps = whole_number("steps", steps, least=1)
        if sampler is not None:
            one_of("sampler", sampler, get_args(Sampler))
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
            classes=_classes(classes),
        )
        images = draw_samples(self._source, request, device=self.device, denoise=self.denoiser)
        return images if tensors else as_pil(image_tensors.to_uint8(images))

    def _times(self, times: Sequence[float] | Array) -> Tensor:
        values = numbers("times", times)
        try:
            check_descending(values, shown=str(list(values)))
        except ValueError as error:
            raise UserError(f"times: {error}") from None
        check_range(values, self.config.method, label=f"times {list(values)}")
        return torch.tensor(values, dtype=torch.float64)


def _classes(given: object) -> tuple[int, ...] | Literal["random"] | None:
    if given is None or isinstance(given, str):
        if given is not None:
            one_of("classes", given, ["random"])
        return given  # type: ignore[return-value]
    classes = in_order("classes", given, _CLASSES)
    if not classes:
        raise UserError(f"classes: got {given!r}; give {_CLASSES}")
    return tuple(whole_number("classes", each, least=0) for each in classes)
