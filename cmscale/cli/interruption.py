"""Ends commands that a signal interrupted and that continue when they are given again."""

import sys
from typing import TypeVar

import typer

from cmscale.commands.ending import INTERRUPTED

T = TypeVar("T")


def or_interrupted(result: T | None) -> T:
    """The result; ends the command if a signal interrupted."""
    if result is None:
        print("interrupted; the same command continues", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    return result
