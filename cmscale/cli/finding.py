"""Defines what one check of `cmscale doctor` finds."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        found: What was found, or why it fails, in one line.
        remedy: What to do about it, unless it is ok.
    """

    what: str
    state: State
    found: str
    remedy: str = ""
