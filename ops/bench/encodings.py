"""Compares the encodings of data sets: bytes, speed of encoding and decoding, and what a lossy one changes.

    python ops/bench/encodings.py --source lsun:DIR|folder:DIR|... [--samples 1000] [--image-size 256]

Rates are images per CPU second of this process, which does not depend on the machine's other load: medians of
`--rounds`. The Frechet distance is that of EfficientNet's features between the images as they are stored and as they
were, of the same images: 0 for an encoding without loss.
"""

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED
from cmscale.data.decode import decode, decode_into
from cmscale.evaluation.features.extractor import build_features
from cmscale.evaluation.metrics.frechet import frechet_distance
from cmscale.evaluation.sample_files import batches
from cmscale.evaluation.statistics import Sums, total
from cmscale.io.pictures import decode_picture
from data_prep.making.convert import ENCODINGS, convert, crop
from data_prep.sources import SourceReader, open_source


def images_of(source: str, *, size: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Encoded pictures of a source that are large enough, and their crops, uint8 [size, size, 3]."""
    opened = open_source(source)
    read = SourceReader(opened)
    for key in opened.keys:
        data = read(key)
        pixels = decode_picture(data, exif="ignore").pixels
        if min(pixels.shape[:2]) >= size:
            yield data, crop(pixels, size=size, preprocess="adm")
    read.close()


def rates(encoded: Sequence[bytes], *, size: int, rounds: int) -> float:
    """Decoded images per CPU second."""
    pixels = np.empty((size, size, 3), np.uint8)
    found = []
    for _ in range(rounds):
        since = time.process_time()
        for data in encoded:
            decode_into(data, pixels, crop=True)
        found.append(len(encoded) / (time.process_time() - since))
    return statistics.median(found)


def main(arguments: list[str]) -> int:
    """Runs the comparison."""
    parser = CommandParser(prog="encodings.py", description=__doc__)
    number = whole_number(1)
    parser.add("--source", use=USED, required=True, help="source of images, as for prepare.py")
    parser.add("--samples", use=USED, type=number, default=1000, help="number of images (default: 1000)")
    parser.add("--image-size", use=USED, type=number, default=256, help="side of the images (default: 256)")
    parser.add("--rounds", use=USED, type=number, default=3, help="measurements of the rate of decoding (default: 3)")
    given, _ = parser.read(arguments)
    torch.set_num_threads(1)
    size = given.image_size
    loaded = list(islice(images_of(given.source, size=size), given.samples))
    originals = [image for _, image in loaded]
    extractor = build_features("efficientnet")

    def moments(images: Sequence[np.ndarray]):
        return total(Sums.of(extractor(batch)["pooled"]) for batch in batches(images, 128)).moments()

    reference = moments(originals)
    table = Table("encoding", "KiB per image", "encoded/s", "decoded/s", "pixels changed", "PSNR", "FD", box=None)
    for encoding in ENCODINGS:
        since = time.process_time()
        encoded = [convert(data, size=size, preprocess="adm", encoding=encoding) for data, _ in loaded]
        making = len(encoded) / (time.process_time() - since)
        stored = [decode(data, side=size) for data in encoded]
        errors = [a.astype(np.int32) - b for a, b in zip(stored, originals, strict=True)]
        changed = statistics.mean(float((error != 0).any(-1).mean()) for error in errors)
        mean_square = statistics.mean(float(np.square(error).mean()) for error in errors)
        table.add_row(
            encoding,
            f"{statistics.mean(map(len, encoded)) / 1024:.1f}",
            f"{making:.0f}",
            f"{rates(encoded, size=size, rounds=given.rounds):.0f}",
            f"{changed:.1%}",
            f"{10 * np.log10(255**2 / mean_square):.1f} dB" if mean_square else "exact",
            f"{frechet_distance(moments(stored), reference):.3f}" if mean_square else "0",
        )
    Console(width=120).print(table)
    print(f"{len(loaded)} images of {size} px from {given.source}")
    return 0


if __name__ == "__main__":
    leave(guarded(main))
