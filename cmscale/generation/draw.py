"""Owns drawing many samples of a source: in batches, from given noise or seeds, to the files that other tools read."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cmscale.consistency.sampler import Sampler, default_sigmas, sample
from cmscale.consistency.solver import Denoise
from cmscale.errors import UserError
from cmscale.io import pictures
from cmscale.io.fetch import local_file
from cmscale.io.storage import replace_durably
from cmscale.rng import generator
from cmscale.runs.manifests import read_document
from cmscale.runs.results import TimeSearch
from cmscale.source import Source


@dataclass(frozen=True)
class SampleRequest:
    """What to draw. `noise` is unit-variance start noise [num, 3, H, W]; `sigmas` descending times.

    Of a class-conditional network sample i has class `classes[i % len(classes)]`, or with `random` one that (seed, i)
    draws.
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

    def with_files(self, *, noise: Path | None, times: str | None, shape: Sequence[int]) -> "SampleRequest":
        """The request with `--noise FILE.npy` and `--times 80,4.4` (or a search's JSON) read and checked."""
        request = self
        if noise is not None:
            request = replace(request, noise=_read_noise(noise, shape=(self.num, *shape)))
        if times is not None:
            request = replace(request, sigmas=_parse_times(times))
        return request


def draw_samples(
    source: Source,
    request: SampleRequest,
    *,
    device: torch.device,
    advance: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The samples, float32 [num, 3, H, W] on the CPU; `advance` hears how many a batch brought."""
    denoise = source.denoiser(device)
    done = []
    for start in range(0, request.num, request.batch_size):
        indices = range(start, min(start + request.batch_size, request.num))
        done.append(draw_batch(source, denoise, request, indices=indices, device=device).cpu())
        if advance is not None:
            advance(len(indices))
    return torch.cat(done)


def draw_batch(
    source: Source, denoise: Denoise, request: SampleRequest, *, indices: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The samples of `indices`, float32 [len(indices), 3, H, W] on the device."""
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
    """The classes of the samples `indices`, int64; None of an unconditional network.

    Raises:
        UserError: classes where the network has none, none where it needs them, or one that it doesn't have.
    """
    count, classes = source.config.model.num_classes, request.classes
    if count is None:
        if classes is not None:
            raise UserError(f"--classes: {source.origin} is unconditional (model.num_classes is not set)")
        return None
    if classes is None:
        raise UserError(f"{source.origin}: is class-conditional; give --classes random, or numbers of 0 to {count - 1}")
    if classes == "random":
        drawn = [torch.randint(count, (), generator=generator(request.seed, i, "class")) for i in indices]
        return torch.stack(drawn)
    if max(classes) >= count:
        raise UserError(f"--classes: {max(classes)} is no class of {source.origin}, they are 0 to {count - 1}")
    return torch.tensor([classes[i % len(classes)] for i in indices])


def parse_classes(text: str | None) -> tuple[int, ...] | Literal["random"] | None:
    """`--classes 1,2|random`."""
    if text is None:
        return None
    if text == "random":
        return "random"
    if not all(part.isdecimal() for part in text.split(",")):
        raise UserError(f"--classes: got {text!r}; write whole numbers, 1,2, or random")
    return tuple(int(part) for part in text.split(","))


def write_samples(images: torch.Tensor, out: Path, *, raw: bool, grid: Path | None) -> None:
    """Writes `arr_0`: uint8 NHWC, or with `raw` float32 NCHW; and a PNG of the first 256."""
    pixels = pictures.to_uint8(images)
    array = images.numpy() if raw else pixels.permute(0, 2, 3, 1).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=array)
    replace_durably(out, buffer.getvalue())
    if grid is not None:
        pictures.save_png(pictures.grid(pixels[:256]), grid)


def used_sigmas(source: Source, request: SampleRequest) -> torch.Tensor:
    """The descending times that a request samples at, float64: its own, or the default ones of its steps."""
    if request.sigmas is None:
        return default_sigmas(source.config.method, request.steps)
    if source.config.method.facts.sampler != "ode" or request.sigmas[-1] == 0:
        return request.sigmas
    return torch.cat([request.sigmas, request.sigmas.new_zeros(1)])  # an EDM model's times end with 0


def _read_noise(path: Path, *, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        noise = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"--noise {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--noise {path}: not an .npy file of numbers ({error})") from None
    if noise.shape != shape or noise.dtype != np.float32:
        raise UserError(f"--noise {path}: holds {noise.dtype} {list(noise.shape)}, needed is float32 {list(shape)}")
    return torch.from_numpy(noise)


def _parse_times(text: str) -> torch.Tensor:
    if text.endswith(".json"):
        found = read_document(TimeSearch, local_file(text).read_bytes(), origin=text)
        if not found.times:
            raise UserError(f"--times {text}: the search has found nothing yet; let cmscale search-times end")
        return torch.tensor(found.times, dtype=torch.float64)
    try:
        times = torch.tensor([float(part) for part in text.split(",")], dtype=torch.float64)
    except ValueError:
        raise UserError(f"--times: got {text!r}; write descending numbers, 80,4.4") from None
    if not bool(torch.isfinite(times).all()) or not bool((times[:-1] > times[1:]).all()) or bool((times < 0).any()):
        raise UserError(f"--times: got {text!r}; the times must descend and not be negative")
    return times
