"""Tells a model card that cmscale wrote from one that somebody has edited, which is not replaced."""

import hashlib

from cmscale.errors import UserError
from cmscale.io.place import Place

_SEAL = "\n<!-- Written by cmscale, which replaces this card at the next export unless it was edited: "


def sealed(card: str) -> str:
    """The card with a last line, not shown, by which `refuse_edited` knows it."""
    return f"{card}{_SEAL}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def refuse_edited(place: Place) -> None:
    """Raises UserError if a file is there that is no card as `sealed` gives it: what it says would be lost."""
    held = place.read_if_present()
    if held is None:
        return
    text = held.decode("utf-8", "replace").replace("\r\n", "\n")  # as git may write it
    if sealed(text.rpartition(_SEAL)[0]) != text:
        raise UserError(
            f"{place}: was edited, or was not written by this release, and would be replaced; move it away, or export "
            "to another folder"
        )
