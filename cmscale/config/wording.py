"""Says in words what a value of a config should be, and what may be meant by the one that was given."""

import math
import re
import reprlib
from typing import Any

_SHOWN = reprlib.Repr()  # of a value in a message: YAML's aliases can make it endless
_SHOWN.maxstring = _SHOWN.maxother = 200

_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?\d+(:[0-5]?\d)+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_SECTION_TYPES = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "two numbers, such as 10:15",  # of train.profile_steps, the one key with a pattern
    "tuple_type": "a list, such as [a, b]",
    "list_type": "a list, such as [a, b]",
    **dict.fromkeys(_SECTION_TYPES, "a section of keys with values"),
}
"""By pydantic's type of an error; others are worded well by pydantic."""


def shown(value: Any) -> str:
    """A value as YAML writes it, if it is short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float, str, list, tuple)):
        return _SHOWN.repr(list(value) if isinstance(value, tuple) else value)
    return "a mapping" if isinstance(value, dict) else type(value).__name__


def what_is_wrong(error: dict[str, Any]) -> str:
    """One of pydantic's errors in words: `got X; it should be Y`, with a hint where it is known what is meant."""
    value, kind = error["input"], error["type"]
    if kind in _SECTION_TYPES and value is None:
        return "is an empty section; write its keys below it, indented, or remove it"
    if kind == "invalid_key":
        return f"got {shown(value)}, which is no key; keys are text (a comma ends the value before it)"
    if kind in ("too_long", "too_short"):
        context = error["ctx"]
        bound = f"most {context['max_length']}" if kind == "too_long" else f"least {context['min_length']}"
        return f"got {shown(value)}; it should have at {bound} values"
    message = error["msg"].replace("Input should", "it should")
    wanted = f"it should be {_WANTED[kind]}" if kind in _WANTED else message
    return f"got {shown(value)}; {wanted}{_hint(value, kind)}"


def _hint(value: Any, kind: str) -> str:
    """What is meant, perhaps, by text in place of a number, or by a number in place of text."""
    if kind == "string_type" and isinstance(value, bool):
        return f"; quote it: '{shown(value)}' (in key=value: \"'{shown(value)}'\")"
    if kind == "int_type" and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return f"; write {int(value)}"
    if kind not in ("int_type", "float_type") or not isinstance(value, str):
        return ""
    if _LEADING_ZERO.fullmatch(value):
        return f": a number has no leading zero, write {int(value.replace('_', ''))} (octal: 0o...)"
    if _SEXAGESIMAL.fullmatch(value):
        return ": with colons it is text, write one number"
    if _NUMBER.fullmatch(value):
        return ": in quotes it is text, remove them"
    return ""
