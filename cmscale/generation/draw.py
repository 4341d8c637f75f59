"""Draws samples from a source in batches.

The noise and class of sample i depend on (seed, i) alone. Its pixels depend by rounding on the batch in which it is
drawn, as libraries choose their kernels by its size: a truncated pixel may differ by one of 255 levels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from cmscale.config import MethodSection, Model
from cmscale.config.added import added_at_older_value
from cmscale.config.draw_request import check_classes
from cmscale.config.sampling_times import check_descending, check_range, is_file, parse_times
from cmscale.consistency.sampler import Sampler, default_sigmas, num_evaluations, sample
from cmscale.consistency.solver import Denoise
from cmscale.errors import UserError
from cmscale.io.fetch import local_file
from cmscale.io.place import Place
from cmscale.io.reading import reading
from cmscale.rng import generator
from cmscale.runs.manifests import read_document
from cmscale.runs.results import TimeSearch
from cmscale.source import Source


@dataclass(frozen=True)
class SampleRequest:
    """The settings of `cmscale sample`; None selects the method's default.

    Attributes:
        noise: Unit-variance start noise [num, 3, H, W], in place of noise drawn from the seed.
        sigmas: Descending times, float64.
        classes: For class-conditional networks: sample i has class classes[i % len(classes)], or with `random` a class
            drawn from (seed, i).
    """

    num: int
    steps: int | None = None
    seed: int = 0
    sampler: Sampler = "heun"
    clip: bool = True
    batch_size: int = 64
    noise: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None
    classes: tuple[int, ...] | Literal["random"] | None = None

    def with_files(
        self, *, noise: Place | None, times: str | None, shape: Sequence[int], method: MethodSection
    ) -> "SampleRequest":
        """The request with the values of `--noise FILE.npy` and `--sampling-times 80,4.4` (or a search's JSON file).

        Args:
            shape: Shape of a sample, (3, H, W).
            method: The model's, whose range the times must lie in.

        Raises:
            UserError: a file is missing or damaged, the noise does not fit, or the times do not descend in the
                model's range.
        """
        request = self
        if noise is not None:
            request = replace(request, noise=_read_noise(noise, shape=(self.num, *shape)))
        if times is not None:
            request = replace(request, sigmas=read_times(times, method))
        return request


def draw_samples(
    source: Source,
    request: SampleRequest,
    *,
    device: torch.device,
    denoise: Denoise | None = None,
) -> torch.Tensor:
    """Draws all samples of a request, float32 [num, 3, H, W] on the CPU.

    Args:
        denoise: The source's network on the device, if it is there already.

    Raises:
        UserError: they need more memory than the system ever gives, which is known before the first is drawn.
    """
    denoise = denoise or source.denoiser(device)
    try:
        samples = torch.empty((request.num, *source.image_shape), dtype=torch.float32, device="cpu")
    except (RuntimeError, TypeError):  # TypeError: of a number of more than 64 bits
        needed = request.num * math.prod(source.image_shape) * 4 // 2**30
        raise UserError(
            f"--samples: {request.num} need {needed:,} GiB of memory at once; draw fewer, or all by "
            "launchers/sample.py, which writes them as it goes"
        ) from None
    for start in range(0, request.num, request.batch_size):
        indices = range(start, min(start + request.batch_size, request.num))
        samples[start : indices.stop] = draw_batch(source, denoise, request, indices=indices, device=device)
    return samples


def evaluations_of(source: Source, request: SampleRequest) -> int:
    """How often the network is evaluated for a sample of a request."""
    steps = int(torch.count_nonzero(used_sigmas(source, request)))
    return num_evaluations(source.config.method, steps, request.sampler)


def advancing(denoise: Denoise, advance: Callable[[float], None], *, evaluations: int) -> Denoise:
    """The denoiser, which calls `advance` with the part of the samples that each of its evaluations has made."""

    def counted(x: torch.Tensor, sigma: torch.Tensor, **keywords: Any) -> torch.Tensor:
        found = denoise(x, sigma, **keywords)
        advance(len(x) / evaluations)
        return found

    return counted


def draw_batch(
    source: Source, denoise: Denoise, request: SampleRequest, *, indices: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Draws the samples `indices`, float32 [len(indices), 3, H, W] on the device."""
    noise = None if request.noise is None else request.noise[list(indices)]
    labels = class_labels(source, request, indices=indices)
    if labels is not None:
        denoise = partial(denoise, labels=labels.to(device))
    return sample(
        source.config.method,
        denoise,
        seed=request.seed,
        indices=indices,
        steps=request.steps,
        shape=source.image_shape,
        device=device,
        noise=noise,
        sigmas=used_sigmas(source, request),
        sampler=request.sampler,
        clip=request.clip,
    )


def class_labels(source: Source, request: SampleRequest, *, indices: Sequence[int]) -> torch.Tensor | None:
    """The classes of the samples `indices`, int64; None for an unconditional network.

    Raises:
        UserError: classes are given to an unconditional network, are missing, or do not exist.
    """
    classes = request.classes
    check_classes(classes, source.config, origin=source.origin)
    count = source.config.model.num_classes
    if count is None or classes is None:
        return None
    if classes == "random":
        drawn = [torch.randint(count, (), generator=generator(request.seed, i, "class")) for i in indices]
        return torch.stack(drawn)
    return torch.tensor([classes[i % len(classes)] for i in indices])


def protocol_of(source: Source, draw: SampleRequest) -> dict[str, Any]:
    """What determines a sample, except its seed and the size of its batch."""
    sampler = source.config.method.facts.sampler
    return {
        "weights_sha256": source.fingerprint,
        "model": _network(source.config.model),
        "sampler": draw.sampler if sampler == "ode" else sampler,
        "sigmas": used_sigmas(source, draw).tolist(),
        "clip": draw.clip,
        "quantisation": "truncated to uint8",
        **({} if draw.classes is None else {"classes": draw.classes}),
    }


def _network(model: Model) -> dict[str, Any]:
    """The settings of the network that a sample may depend on, without keys that older results do not have."""
    values = model.described()
    older = added_at_older_value("model", values)
    return {key: value for key, value in values.items() if key not in older}


def machine_of(device: torch.device) -> dict[str, Any]:
    """Torch and the device, which change a result by rounding."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name}


def used_sigmas(source: Source, request: SampleRequest) -> torch.Tensor:
    """The descending times of a request, float64: `request.sigmas`, or the default times of its steps.

    The default is the config's `sampling.times` if it has that many, else the method's.

    Raises:
        UserError: the default times of its steps are outside the model's range.
    """
    if request.sigmas is None:
        method, times = source.config.method, source.config.sampling.times
        if times is not None and len(times) == (request.steps or method.default_sampling_steps):
            return torch.tensor(times, dtype=torch.float64)
        return default_sigmas(method, request.steps)
    if source.config.method.facts.sampler != "ode" or request.sigmas[-1] == 0:
        return request.sigmas
    return torch.cat([request.sigmas, request.sigmas.new_zeros(1)])  # an EDM model's times end with 0


def _read_noise(place: Place, *, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        path = local_file(place)
    except UserError as error:
        raise UserError(f"--noise {error}") from None
    with reading(f"--noise {place}", "an .npy file of numbers", advice="write it with numpy.save"):
        noise = np.load(path, mmap_mode="c", allow_pickle=False)  # mapped: only what is used is in memory
    if not isinstance(noise, np.ndarray):
        raise UserError(f"--noise {place}: holds several arrays (.npz); write one with numpy.save")
    if noise.shape != shape or noise.dtype != np.float32:
        held = f"{str(noise.dtype)[:40]} {list(noise.shape)[:8]}"
        raise UserError(f"--noise {place}: holds {held}; give float32 {list(shape)}")
    if not all(np.isfinite(one).all() for one in noise):
        raise UserError(f"--noise {place}: holds NaN or infinity; write finite numbers")
    return torch.from_numpy(noise)


def read_times(text: str, method: MethodSection) -> torch.Tensor:
    """The times that `--sampling-times 80,4.4` or the JSON of a search names there, descending, float64.

    Raises:
        UserError: no times, they do not descend, or the model was not trained at them.
    """
    try:
        times = _searched_times(text) if is_file(text) else parse_times(text)
        check_descending(times, shown=text)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--sampling-times: {error}") from None
    check_range(times, method, label=f"--sampling-times {text}")
    return torch.tensor(times, dtype=torch.float64)


def _searched_times(file: str) -> tuple[float, ...]:
    found = read_document(TimeSearch, local_file(file).read_bytes(), origin=file)
    if not found.times:
        raise UserError(f"--sampling-times {file}: the search is not finished; let cmscale search-times finish")
    return found.times
