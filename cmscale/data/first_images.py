"""Loads the first images of a data set as tensors, for measurements outside training."""

import torch

from cmscale.data.samples import read_images
from cmscale.errors import UserError
from cmscale.io import image_tensors


def first_images(url: str, *, count: int, size: int) -> torch.Tensor:
    """The first `count` images of a prepared data set (all, if it has fewer), float32 [N, 3, size, size] in [-1, 1].

    Raises:
        UserError: there is no data set, or its images have another size.
    """
    images = [torch.from_numpy(image.copy()) for image, _ in read_images(url, limit=count)]
    if images[0].shape[:2] != (size, size):
        raise UserError(f"{url}: its images are {images[0].shape[0]} px wide, the network takes {size} px")
    return image_tensors.from_uint8(torch.stack(images).permute(0, 3, 1, 2))
