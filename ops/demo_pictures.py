"""Draws the demo's pictures: `learned.png`, samples beside photographs, and `edits.png`, edited photographs."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import cmscale
from data_prep.demo import VIEWS, in_turn

COLUMNS = 12
TILE, GAP, LABEL = 96, 4, 170  # px
HELD_OUT = 1
"""Seed of the crops that are shown and edited; those of the training data have seed 0."""

Row = tuple[str, Sequence[Image.Image]]


def main(runs: Path) -> None:
    """Writes both pictures into the folder that holds the runs `edm`, `cd` and `ct`."""
    student = cmscale.load(runs / "cd")
    photographs = list(in_turn(VIEWS.values(), count=COLUMNS, side=student.image_size, seed=HELD_OUT))
    sheet(learned(runs, student, photographs)).save(runs / "learned.png", optimize=True)
    sheet(edited(student, photographs[: COLUMNS // 3])).save(runs / "edits.png", optimize=True)


def learned(runs: Path, student: cmscale.Model, photographs: Sequence[Image.Image]) -> list[Row]:
    """Photographs, and samples of the untrained network, of the teacher, of CD and of CT, from the same noise."""
    return [
        ("photographs", photographs),
        ("step 0", cmscale.load(runs / "edm", step=0).sample(COLUMNS)),
        ("teacher", cmscale.load(runs / "edm").sample(COLUMNS)),
        ("CD, one step", student.sample(COLUMNS, steps=1)),
        ("CD, two steps", student.sample(COLUMNS, steps=2)),
        ("CT, one step", cmscale.load(runs / "ct").sample(COLUMNS, steps=1)),
    ]


def edited(student: cmscale.Model, photographs: Sequence[Image.Image]) -> list[Row]:
    """A row per task with photograph, input and result of each photograph, and a row between two samples."""
    size = student.image_size
    missing = np.zeros((size, size), dtype=bool)
    missing[size // 2 : size - size // 8, size // 4 : size - size // 4] = True
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in photographs])
    clean = pixels.float() / 127.5 - 1
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(HELD_OUT))
    small = [image.resize((size // 4, size // 4), Image.Resampling.BOX) for image in photographs]
    tasks = {
        "inpaint": ([with_hole(image, missing) for image in photographs], student.inpaint(photographs, missing)),
        "colorize": ([image.convert("L") for image in photographs], student.colorize(photographs)),
        "superres": (small, student.superres(small, factor=4)),
        "denoise": ([picture(image) for image in noisy], student.denoise(noisy, sigma=0.5)),
    }
    rows: list[Row] = []
    for task, (given, results) in tasks.items():
        triples = zip(photographs, given, results, strict=True)
        rows.append((task, [image for triple in triples for image in triple]))
    return [*rows, ("interpolate", student.interpolate(count=COLUMNS))]


def with_hole(image: Image.Image, missing: np.ndarray) -> Image.Image:
    """The image with missing pixels in grey."""
    return Image.fromarray(np.where(missing[..., None], np.uint8(128), np.array(image)))


def picture(values: torch.Tensor) -> Image.Image:
    """The image of [3, H, W] in [-1, 1]; values outside are clipped."""
    return Image.fromarray(((values.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of enlarged images with the name of each row before it."""
    columns = max(len(images) for _, images in rows)
    width, height = LABEL + columns * (TILE + GAP), GAP + len(rows) * (TILE + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=22)
    for number, (name, images) in enumerate(rows):
        top = GAP + number * (TILE + GAP)
        draw.text((LABEL - 3 * GAP, top + TILE // 2), name, fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
            canvas.paste(tile, (LABEL + column * (TILE + GAP), top))
    return canvas


if __name__ == "__main__":
    main(Path(sys.argv[1]))
