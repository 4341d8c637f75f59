"""Images: quantised as published results are, tiled without loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmscale.errors import UserError
from cmscale.io.image_tensors import from_uint8, grid, picture, save_png, to_uint8


def test_samples_are_quantised_as_published_results_are() -> None:
    steps = torch.arange(256) / 127.5 - 1
    exact = ((steps + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert torch.equal(to_uint8(steps.reshape(1, 1, 16, 16)).flatten(), exact)
    assert to_uint8(torch.tensor([[-7.0, -1.0, 0.0, 1.0, 9.0]])).tolist() == [[0, 0, 127, 255, 255]]


def test_samples_with_nan_are_refused_with_their_number() -> None:
    broken = torch.zeros(5, 3, 2, 2)
    broken[1, 0, 0, 0] = torch.nan
    broken[3, 2, 1, 1] = torch.inf
    with pytest.raises(UserError, match="2 of 5 hold NaN"):
        to_uint8(broken)


def test_uint8_survives_the_way_there_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(every), nearest=True), every)


def test_a_grid_shows_every_pixel_of_every_image(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(grid(images, columns=2, scale=1, gap=1), tmp_path / "grid.png")
    shown = np.asarray(Image.open(tmp_path / "grid.png"))
    assert shown.shape == (3 * 9 + 1, 2 * 9 + 1, 3)
    for index, image in enumerate(images):
        top, left = 1 + index // 2 * 9, 1 + index % 2 * 9
        assert np.array_equal(shown[top : top + 8, left : left + 8], image.permute(1, 2, 0).numpy())


def test_a_picture_is_the_pixels_alone() -> None:
    image = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(np.asarray(picture(image)), image.permute(1, 2, 0).numpy())
