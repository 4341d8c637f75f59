"""Numbers that remember how they are written, for keys whose values are text: an account may be 1_000, 0x10 or 1e3."""

from typing import Any


class WrittenInt(int):
    """A whole number whose `text` is not what Python writes for it."""

    text: str


class WrittenFloat(float):
    """A number whose `text` is not what Python writes for it."""

    text: str


def with_text(number: int | float, text: str) -> int | float:
    """A number that was read from a text, and remembers the text if it is written in another way than Python's."""
    if str(number) == text:
        return number
    written = WrittenInt(number) if isinstance(number, int) else WrittenFloat(number)
    written.text = text
    return written


def as_written(value: Any) -> Any:
    """A number as the text that it was read from; any other value as it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return getattr(value, "text", None) or str(value)
    return value
