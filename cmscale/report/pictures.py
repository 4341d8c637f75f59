"""Prepares the page's pictures: sample grids over training, what to see them beside, edits.

A picture is enlarged or reduced by a whole factor, so that pixels of equal size stay equal. Browsers only ever reduce
it further, smoothly, on windows that are narrower.
"""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from cmscale.errors import UserError
from cmscale.io.pictures import BadImage, decode_picture
from cmscale.io.reading import files_in, read_regular
from cmscale.report.facts import RunFacts
from cmscale.runs.folder import RunDir, step_of

WIDTH = 540
"""Of a picture on the page, in CSS pixels. It holds up to twice as many pixels, for dense screens."""
_MOST_GRIDS = 24
_MOST_EDITS = 12
_BUDGET = 6 << 20  # bytes of all grids
_LARGE = 300_000  # bytes, from which on a PNG is stored as WebP


@dataclass(frozen=True)
class Shown:
    """A picture of the page.

    Attributes:
        source: A data URL.
        file: The file it was made of, relative to the page's folder, as a URL.
        width, height: In CSS pixels.
    """

    caption: str
    source: str
    file: str
    width: int
    height: int

    @property
    def size(self) -> int:
        """The bytes that the picture takes in the page."""
        return len(self.source)


@dataclass(frozen=True)
class Pictures:
    """All pictures of a page.

    Attributes:
        grids: Sample grids by step; where there are too many, at even distances, with the first and the last.
        count: How many grids the run has.
        beside: Training images, and the teacher's samples.
        edits: Edits that were made with the run's network, the newest first.
        num_edits: How many the run has.
        damaged: One line per file that can't be read.
    """

    grids: list[Shown]
    count: int
    beside: list[Shown]
    edits: list[Shown]
    num_edits: int
    damaged: list[str]


def read_pictures(facts: RunFacts) -> Pictures:
    """Reads the pictures of a run, in at most about 10 MiB."""
    damaged: list[str] = []
    page = facts.run.report.parent

    def shown(path: Path, caption: str) -> Shown | None:
        try:
            return _shown(path, caption, page)
        except (BadImage, OSError, UserError) as error:
            damaged.append(f"{path.name}: the grid of samples can't be read ({error})")
            return None

    grids: list[Shown] = []
    if facts.grids:
        last = shown(facts.grids[-1][1], _step(facts.grids[-1][0]))
        room = _MOST_GRIDS if last is None else max(2, min(_MOST_GRIDS, _BUDGET // last.size))
        chosen = [facts.grids[place] for place in _even(len(facts.grids), room)][:-1]
        grids = [each for step, path in chosen if (each := shown(path, _step(step)))]
        grids += [last] if last else []
    beside = [
        each
        for path, caption in (
            (facts.run.real_images, "training images"),
            *_teacher(facts),
        )
        if path.is_file() and (each := shown(path, caption))
    ]
    edits = sorted(
        (path for path in files_in(facts.run.edits, "*.png") if path.is_file()),
        key=lambda path: (-path.stat().st_mtime_ns, path.name),
    )
    return Pictures(
        grids=grids,
        count=len(facts.grids),
        beside=beside,
        num_edits=len(edits),
        edits=[each for path in edits[:_MOST_EDITS] if (each := shown(path, path.stem.replace("_", " ")))],
        damaged=damaged,
    )


def _step(step: int) -> str:
    return f"step {step:,}"


def _even(count: int, most: int) -> list[int]:
    """At most `most` places of 0..count-1 at even distances, with both ends."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _teacher(facts: RunFacts) -> list[tuple[Path, str]]:
    """The teacher's samples: those in the run's folder, else the newest grid of the teacher's own run."""
    if facts.run.teacher_samples.is_file():
        return [(facts.run.teacher_samples, "teacher")]
    source = facts.setting("method.teacher")
    if not isinstance(source, str) or "://" in source:
        return []
    place = Path(source).expanduser()
    for folder in (place, *place.parents[:2]):  # a run, or a checkpoint or exported file in it
        grids = files_in(RunDir(folder).samples, f"step-{'[0-9]' * 9}.png")
        if grids:
            return [(grids[-1], f"teacher {folder.name}, {_step(step_of(grids[-1].stem))}")]
    return []


def _shown(path: Path, caption: str, page: Path) -> Shown:
    """Reads a PNG file. Raises BadImage if it is damaged."""
    picture = Image.fromarray(decode_picture(read_regular(path), exif="ignore", formats=("PNG",)).pixels)
    picture = _fitted(picture)
    dense = 2 if max(picture.size) > WIDTH else 1
    file = quote(os.fsencode(os.path.relpath(path, page)))
    return Shown(caption, _data_url(picture), file, -(-picture.width // dense), -(-picture.height // dense))


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture enlarged or reduced by a whole factor to between `WIDTH` and twice that, as near as there is one."""
    side = max(picture.size)
    if side > 2 * WIDTH:
        return picture.reduce(-(-side // (2 * WIDTH)))
    factor = max(1, WIDTH // side)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=False)
    kind = "png"
    if buffer.tell() > _LARGE:
        buffer, kind = io.BytesIO(), "webp"
        picture.save(buffer, "WEBP", quality=85, method=2)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
