"""Parses JSON that somebody else may have written or damaged: one kind of error for whatever is wrong with it."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value in JSON text.

    Raises:
        ValueError: it is no JSON, no UTF-8, holds a number of too many digits, or is nested too deeply.
    """
    try:
        return json.loads(text)  # noqa: TID251
    except RecursionError:
        raise ValueError("nested too deeply") from None
