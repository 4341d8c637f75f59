"""Edits pictures with a consistency model by one of the zero-shot tasks, and writes the results."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from cmscale.consistency.solver import Denoise
from cmscale.generation.draw import advancing
from cmscale.generation.edit_request import EditInputs, EditRequest, result_paths
from cmscale.generation.task_settings import check_task
from cmscale.generation.tasks import add_noise, apply_task, evaluations_of_task, interpolated
from cmscale.io import image_tensors
from cmscale.io.counting import Counting
from cmscale.io.place import Place
from cmscale.source import Source


def edit_images(
    source: Source,
    request: EditRequest,
    inputs: EditInputs,
    *,
    out: Place,
    strips: Sequence[Place] = (),
    device: torch.device,
) -> list[Place]:
    """Writes the result of each picture as a PNG of the model's size, at `out`; see `result_paths`.

    The result of `interpolate` is one PNG with all its pictures in a row.

    Args:
        inputs: What `read_inputs` gives for the request and the model's size.
        strips: Files that also get a PNG with a row per picture: the picture, the task's input, and the result,
            enlarged; of `interpolate` its result.

    Returns:
        The files with results.

    Raises:
        UserError: the model is not an unconditional consistency model, or a setting is outside of its range.
    """
    check_task(source.config, request, origin=source.origin)
    originals = torch.from_numpy(inputs.pictures)
    if request.task == "interpolate":
        with _counted(source, request, device=device, of_pictures=len(originals) > 0) as denoise:
            tiles = _interpolate(source, denoise, request, originals, device=device)
        picture = image_tensors.png_bytes(image_tensors.grid(tiles, columns=len(tiles)))
        for place in (out, *strips):
            place.write(picture)
        return [out]
    clean = image_tensors.from_uint8(originals).to(device)
    given = add_noise(clean, request) if request.task == "denoise" else clean
    missing = torch.from_numpy(inputs.missing)
    with _counted(source, request, device=device) as denoise:
        task_input, result = apply_task(source, denoise, request, given, missing)
    results = image_tensors.to_uint8(result.cpu(), nearest=True)
    paths = result_paths(out, len(results))
    for path, image in zip(paths, results, strict=True):
        path.write(image_tensors.png_bytes(image_tensors.picture(image)))
    tiles = torch.stack([originals, image_tensors.to_uint8(task_input.cpu(), nearest=True), results], dim=1)
    for strip in strips:
        strip.write(image_tensors.png_bytes(image_tensors.grid(tiles.flatten(0, 1), columns=3)))
    return paths


@contextmanager
def _counted(
    source: Source, request: EditRequest, *, device: torch.device, of_pictures: bool = True
) -> Iterator[Denoise]:
    """The network on the device, whose evaluations are counted and shown."""
    total = evaluations_of_task(request, of_pictures=of_pictures)
    with Counting(request.task, total=total, unit="evaluations of the network") as counting:
        yield advancing(source.denoiser(device), lambda _: counting.advance(), evaluations=1)


def _interpolate(
    source: Source, denoise: Denoise, request: EditRequest, originals: torch.Tensor, *, device: torch.device
) -> torch.Tensor:
    """The strip of `interpolate`, uint8 [count, 3, H, W]."""
    ends = image_tensors.from_uint8(originals).to(device) if len(originals) else None
    strip = interpolated(source, denoise, request, ends=ends, device=device)
    return image_tensors.to_uint8(strip.cpu().clamp(-1, 1))
