"""Finds the reference formats, reads a file in whichever format it has, and lists the formats that can be written."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import cmscale.evaluation.reference as package
from cmscale.errors import UserError
from cmscale.io.reading import why_no_file

if TYPE_CHECKING:
    from cmscale.evaluation.features.extractor import FeatureExtractor
    from cmscale.evaluation.reference.reference import Reference

_COMMON = ("reference", "registry", "subset")


@dataclass(frozen=True, kw_only=True)
class ReferenceWriter:
    """How references are written in a format.

    Attributes:
        suffix: The end of its files' names.
        networks: The feature networks of which it holds statistics; empty for any.
        keeps_images: Whether its files hold images, for KID, precision and recall.
        write: Called with (path, reference, images of its subset: uint8 [H, W, 3], read one at a time). A crash leaves
            the old file or the new one.
        check: Called with (path, label of the features, count of images, source) before the images are measured.
            Raises UserError if such statistics can't be written there.
    """

    suffix: str
    networks: tuple[str, ...] = ()
    keeps_images: bool = False
    write: "Callable[[Path, Reference, Iterable[np.ndarray]], None]"
    check: Callable[[Path, str, int, str], None] = lambda *_: None


@dataclass(frozen=True, kw_only=True)
class ReferenceFormat:
    """A format of files with statistics or images.

    Attributes:
        description: Suffix and contents, for messages.
        suffixes: The ends of its files' names.
        matches: Whether an existing file or folder has this format; exactly one format matches. It is called with a
            file that ends in one of `suffixes`, or with a folder if `suffixes` contains the empty string.
        read: Reads it for an extractor's features. Raises UserError.
        writer: How it is written; None if it is only read.
    """

    description: str
    suffixes: tuple[str, ...]
    matches: Callable[[Path], bool]
    read: "Callable[[Path, FeatureExtractor], Reference]"
    writer: ReferenceWriter | None = None


def reference_formats() -> dict[str, ReferenceFormat]:
    """The formats by the names of their modules.

    Raises:
        TypeError: a module defines no `FORMAT`.
    """
    found: dict[str, ReferenceFormat] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name in _COMMON:
            continue
        name = f"{package.__name__}.{module.name}"
        format = getattr(importlib.import_module(name), "FORMAT", None)
        if not isinstance(format, ReferenceFormat):
            raise TypeError(f"{name}: defines no FORMAT; assign a ReferenceFormat to it")
        found[module.name] = format
    return found


def reference_writers() -> dict[str, ReferenceWriter]:
    """The formats that can be written, by name."""
    return {name: format.writer for name, format in reference_formats().items() if format.writer is not None}


def is_reference_file(name: str) -> bool:
    """Whether a path or URL ends like a file of one of the formats."""
    return any(
        name.lower().endswith(suffix) for each in reference_formats().values() for suffix in each.suffixes if suffix
    )


def read_reference(path: str | Path, extractor: "FeatureExtractor") -> "Reference":
    """Reads a reference for an extractor's features.

    If a file holds images and not their features, the features are extracted here.

    Raises:
        UserError: no such file, an unknown format, or statistics of other features or another width.
    """
    path = Path(path)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"reference {path}: {why_no_file(path, absent='no such file or folder')}")
    suffix = path.suffix.lower() if path.is_file() else ""
    formats = reference_formats().values()
    matching = [each for each in formats if suffix in each.suffixes and each.matches(path)]
    if not matching:
        known = "; ".join(each.description for each in formats)
        raise UserError(f"reference {path}: unknown format; known are: {known}")
    assert len(matching) == 1, f"{path} has several formats: {matching}"
    found = matching[0].read(path, extractor)
    _check(path, found, extractor)
    return found


def _check(path: Path, found: "Reference", extractor: "FeatureExtractor") -> None:
    """Refuses statistics of other features, so that nothing is sampled in vain."""
    if found.features not in (None, extractor.label):
        raise UserError(f"reference {path}: holds {found.features} features, the evaluation uses {extractor.label}")
    if found.pooled.width != extractor.width:
        raise UserError(
            f"reference {path}: features of width {found.pooled.width}, {extractor.label} gives {extractor.width}"
        )
    if found.spatial is not None and extractor.spatial_width not in (None, found.spatial.width):
        raise UserError(
            f"reference {path}: spatial features of width {found.spatial.width}, {extractor.label} gives "
            f"{extractor.spatial_width}"
        )
    if found.subset is None:
        return
    if found.subset.ndim != 2 or found.subset.shape[1] != extractor.width:
        raise UserError(
            f"reference {path}: features_0 {list(found.subset.shape)}, {extractor.label} gives width {extractor.width}"
        )
    if not np.isfinite(found.subset).all():
        raise UserError(f"reference {path}: features_0 holds NaN or infinity")
