"""Prints what `--json` asks for: one document of strict JSON."""

import json
import math
from typing import Any


def print_json(value: Any) -> None:
    """Prints a value as JSON; a number that is not finite, for which JSON has no word, is null."""
    print(json.dumps(_strict(value), indent=1, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
