"""Tells a model card that cmscale wrote from one that somebody has edited, which is not replaced."""

import hashlib

from cmscale.errors import UserError
from cmscale.io.place import Place
from cmscale.io.protocol import Forbidden
from cmscale.io.storage import open_parent

_SEAL = "\n<!-- Written by cmscale, which replaces this card at the next export unless it was edited: "


def begun(grid: str) -> str:
    """A card while what it will describe is written over what another one described.

    Args:
        grid: The file of samples that the other one showed, which the next export may remove; empty if it showed none.
    """
    other = f" than the [samples]({grid})" if grid else ""
    return (
        "# An export that has not ended\n\n"
        f"The weights beside this card may be those of another step{other}. Export them again.\n"
    )


def sealed(card: str) -> str:
    """The card with a last line, not shown, by which `replaceable_card` knows it."""
    return f"{card}{_SEAL}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def replaceable_card(place: Place) -> str | None:
    """The text of a card that is there, as `sealed` gave it; None where none is.

    Raises:
        UserError: a file is there that is no such card: what it says would be lost.
        Forbidden: it can't be seen whether there is one; `write_first_card` writes one all the same.
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


def write_first_card(place: Place, card: str) -> None:
    """Writes a card where none is, which the storage itself makes sure of.

    Raises:
        UserError: there is another one.
    """
    storage, key = open_parent(place)
    try:
        is_written = storage.write_if_absent(key, sealed(card).encode())
    except Forbidden:  # to read what is there
        is_written = False
    if not is_written:
        raise UserError(
            f"{place}: is there, or may not be written, and may not be read, so it is not replaced; allow s3:GetObject "
            "and s3:ListBucket (ops/templates/bucket_policy.json), or name another file"
        )
