"""Tells a model card that cmscale wrote from one that somebody has edited, which is not replaced."""

import hashlib

from cmscale.errors import UserError
from cmscale.io.place import Place

_SEAL = "\n<!-- Written by cmscale, which replaces this card at the next export unless it was edited: "


def sealed(card: str) -> str:
    """The card with a last line, not shown, by which `replaceable_card` knows it."""
    return f"{card}{_SEAL}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def replaceable_card(place: Place) -> str | None:
    """The text of a card that is there, as `sealed` gave it; None where none is.

    Raises:
        UserError: a file is there that is no such card: what it says would be lost.
    """
    held = place.read_if_present()
    if held is None:
        return None
    text = held.decode("utf-8", "replace").replace("\r\n", "\n")  # as git may write it
    if sealed(text.rpartition(_SEAL)[0]) != text:
        raise UserError(
            f"{place}: was edited, or was not written by this release, and would be replaced; move it away, or export "
            "to another folder"
        )
    return text
