"""Builds argparse flags from request models."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cmscale.config.requests import Option, options_of
from launchers.checks import is_remote


def add_request_flags(parser: argparse.ArgumentParser, request: type[BaseModel]) -> None:
    """Adds a flag or argument per option of a request. A flag that is not given is None."""
    for option in options_of(request):
        shown: dict[str, Any] = {"help": option.help, "metavar": option.metavar or None}
        if option.choices:
            shown |= {"choices": option.choices, "metavar": None}
        elif option.kind is int:
            shown["type"] = whole_number(option.minimum or 0)
        elif option.kind is bool:
            shown = {"help": option.help, "action": "store_true", "default": None}
        if option.flag:
            parser.add_argument(option.flag, dest=option.name, **shown)
        elif option.is_list:
            parser.add_argument(option.name, nargs="*", **{**shown, "metavar": "KEY=VALUE"})
        else:
            parser.add_argument(option.name, **shown)


def request_values(flags: argparse.Namespace, request: type[BaseModel]) -> dict[str, Any]:
    """The values that were given, with absolute paths: the job may run in another folder."""
    found = {option.name: _value(option, getattr(flags, option.name)) for option in options_of(request)}
    return {name: value for name, value in found.items() if value is not None}


def _value(option: Option, value: Any) -> Any:
    if not option.is_path or value is None or is_remote(value):
        return value
    if option.name == "times" and not value.endswith(".json"):  # numbers, not a file
        return value
    return str(Path(value).expanduser().absolute())


def whole_number(least: int) -> Callable[[str], int]:
    """The parser of a flag's whole number of at least `least`, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; it should be a whole number of at least {least}")
        return int(text)

    return parse
