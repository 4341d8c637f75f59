"""Published results that the report shows for comparison: Consistency Models (arXiv 2303.01469), LSUN 256 px."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A row of the paper's table: FID, precision and recall of 50,000 samples."""

    method: str
    nfe: int
    fid: float
    precision: float
    recall: float


PAPER: dict[str, tuple[Published, ...]] = {
    "LSUN Bedroom 256": (
        Published("PD", 1, 16.92, 0.47, 0.27),
        Published("PD", 2, 8.47, 0.56, 0.39),
        Published("CD", 1, 7.80, 0.66, 0.34),
        Published("CD", 2, 5.22, 0.68, 0.39),
        Published("CT", 1, 16.0, 0.60, 0.17),
        Published("CT", 2, 7.85, 0.68, 0.33),
        Published("EDM teacher", 79, 3.57, 0.66, 0.45),
    ),
    "LSUN Cat 256": (
        Published("PD", 1, 29.6, 0.51, 0.25),
        Published("PD", 2, 15.5, 0.59, 0.36),
        Published("CD", 1, 11.0, 0.65, 0.36),
        Published("CD", 2, 8.84, 0.66, 0.40),
        Published("CT", 1, 20.7, 0.56, 0.23),
        Published("CT", 2, 11.7, 0.63, 0.36),
        Published("EDM teacher", 79, 6.69, 0.70, 0.43),
    ),
}

_TITLES = {"cd": "CD", "ct": "CT", "edm": "EDM teacher", "pd": "PD"}
_SAMPLES = 50_000


def published_for(*, kind: str, size: object, data: str, score_name: str, num_samples: int) -> tuple[Published, ...]:
    """The paper's rows that a result may be held against: of its method, on its data, measured alike.

    Args:
        data: What names the data: its path, and the name of the reference.
    """
    if size != 256 or score_name != "FID" or num_samples != _SAMPLES:
        return ()
    words = re.split(r"[^a-z]+", data.lower())
    named = [name for name in PAPER if {_category(name), f"{_category(name)}s"} & {*words}]
    if len(named) != 1:
        return ()
    return tuple(row for row in PAPER[named[0]] if row.method == _TITLES.get(kind))


def _category(name: str) -> str:
    """`bedroom` of `LSUN Bedroom 256`."""
    return name.split()[1].lower()
