"""Places the sample grids of several runs side by side, of steps that can be compared."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cmscale.errors import UserError
from cmscale.io.pictures import BadImage, decode_picture
from cmscale.io.reading import files_in, read_regular
from cmscale.runs.folder import RunDir, step_of

_LARGEST = 640  # px of a grid on the page


@dataclass(frozen=True)
class Beside:
    """A grid of one run in a row; `source` is a data URL, None where there is no grid or it can't be read."""

    run: str
    step: int | None
    source: str | None


@dataclass(frozen=True)
class GridRow:
    """The grids of all runs that belong together, and why."""

    title: str
    grids: tuple[Beside, ...]


def grid_rows(runs: Sequence[RunDir], names: Sequence[str]) -> tuple[GridRow, ...]:
    """Rows of grids: at the step that the shortest run has reached, halfway there, and each run's newest.

    In a row each run shows its last grid up to that step. A row that would repeat another one is left out; no row if no
    run has a grid.
    """
    steps = [_grids(run) for run in runs]
    lasts = [max(found) for found in steps if found]
    if not lasts:
        return ()
    shared = min(lasts)
    rows: dict[tuple[int | None, ...], str] = {}
    for title, limit in (
        (f"At step {shared:,} or the last grid before it", shared),
        (f"At step {shared // 2:,} or the last grid before it", shared // 2),
        ("Newest of each run", max(lasts)),
    ):
        chosen = tuple(max((step for step in found if step <= limit), default=None) for found in steps)
        rows.setdefault(chosen, title)
    return tuple(
        GridRow(
            title,
            tuple(
                Beside(name, step, None if step is None else _inlined(found[step]))
                for name, found, step in zip(names, steps, chosen, strict=True)
            ),
        )
        for chosen, title in rows.items()
    )


def _grids(run: RunDir) -> dict[int, Path]:
    return {step_of(path.stem): path for path in files_in(run.samples, f"step-{'[0-9]' * 9}.png")}


def _inlined(path: Path) -> str | None:
    """A grid as a data URL, scaled down if it is large; None if it can't be read."""
    try:
        data = read_regular(path)
        shown = Image.fromarray(decode_picture(data, exif="ignore", formats=("PNG",)).pixels)
    except (BadImage, OSError, UserError):
        return None
    if max(shown.size) > _LARGEST:
        shown.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        shown.save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
