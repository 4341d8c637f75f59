"""Hashes weights, so that any change of them is seen."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hash of named tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
