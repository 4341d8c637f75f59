"""Chooses the images of a data set that a reference keeps."""

import numpy as np

SUBSET = 10_000  # images kept for KID, precision and recall, as in ADM's references
_SUBSET_SEED = 0


def subset_indices(count: int, subset: int = SUBSET) -> np.ndarray:
    """Indices of the images, of `count`, that a reference keeps: ascending, and the same for the same count."""
    drawn = np.random.RandomState(_SUBSET_SEED).permutation(count)[:subset]
    return np.sort(drawn)
