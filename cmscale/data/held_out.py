"""The first images of a data set as tensors, for measurements that train on nothing."""

import torch

from cmscale.data import read_images
from cmscale.errors import UserError
from cmscale.io import pictures


def held_out_images(url: str, *, count: int, size: int) -> torch.Tensor:
    """The first `count` images of a prepared data set (all, where it has fewer), [N, 3, size, size] in [-1, 1].

    Raises:
        UserError: no data set there, or one of another size.
    """
    found = [torch.from_numpy(image.copy()) for image, _ in read_images(url, limit=count)]
    if found[0].shape[:2] != (size, size):
        raise UserError(f"{url}: its images have {found[0].shape[0]} pixels a side, the network takes {size}")
    return pictures.from_uint8(torch.stack(found).permute(0, 3, 1, 2))
