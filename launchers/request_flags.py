"""Builds argparse flags from request models."""

import argparse
from typing import Any, TypeVar

from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import Given
from cmscale.config.request_fields import Option, options_of
from cmscale.config.sampling_times import is_file
from cmscale.config.source_request import SourceRequest, request_from
from cmscale.io.place import Place

R = TypeVar("R", bound=SourceRequest)


def add_request_flags(parser: CommandParser, request: type[SourceRequest]) -> None:
    """Adds a flag or argument per option of a request. A flag that is not given is None."""
    for option in options_of(request):
        shown: dict[str, Any] = {"help": option.help, "metavar": option.metavar or None}
        if option.choices:
            shown |= {"choices": option.choices, "metavar": None}
        elif option.kind is int:
            shown["type"] = whole_number(option.minimum or 0)
        elif option.kind is bool:
            action = argparse.BooleanOptionalAction if option.negatable else "store_true"
            shown = {"help": option.help, "action": action, "default": None}
        elif option.is_path:
            shown["type"] = Place
        if option.flag:
            if option.default is ...:
                shown["required"] = True
            parser.add(option.flag, dest=option.name, use=option.use, output=option.output, **shown)
        elif option.is_list:
            parser.add(option.name, nargs="*", use=option.use, **{**shown, "metavar": "KEY=VALUE"})
        else:
            parser.add(option.name, use=option.use, **shown)


def read_request(flags: argparse.Namespace, given: Given, request: type[R], **more: Any) -> R:
    """The request of the flags that were given, with absolute paths: the job may run in another folder.

    Args:
        more: Values that do not come from the flags.

    Raises:
        UserError: a value is not allowed.
    """
    values = {option.name: _value(option, getattr(flags, option.name)) for option in options_of(request)}
    return request_from(request, {**{name: value for name, value in values.items() if name in given}, **more})


def _value(option: Option, value: Any) -> Any:
    if not option.is_path or value is None:
        return value
    if option.name == "times" and not is_file(value):  # numbers, not a file
        return value
    return value.absolute()
