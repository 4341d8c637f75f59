"""Says which characters of Unicode no line of text may have: those that end it, or that a terminal obeys."""

import unicodedata

_CATEGORIES = ("Cc", "Zl", "Zp")  # control characters, line breaks
_UNSEEN = ("Cf", "Cs")  # what a terminal does not show, halves of characters


def has_control_characters(text: str, *, or_unseen: bool = False) -> bool:
    """Whether a text has line breaks or other control characters, or with `or_unseen` others that nobody sees."""
    refused = (*_CATEGORIES, *_UNSEEN) if or_unseen else _CATEGORIES
    return any(unicodedata.category(character) in refused for character in text)
