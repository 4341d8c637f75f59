"""Checks the arguments of Python programs: each mistake is a `UserError` that names the argument and its value."""

import functools
import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, ParamSpec, TypeVar

import numpy as np

from cmscale.errors import UserError
from cmscale.io.place import Place

P = ParamSpec("P")
R = TypeVar("R")

_OPTION = re.compile(r"--([a-z][a-z-]*)")
_OTHER_NAMES = {"checkpoint": "step", "samples": "num"}  # of options, where the argument has another


def explained_as_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function, so that its errors name its arguments and not the options of the command line."""
    known = inspect.signature(function).parameters

    def argument(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        return name if name in known else option[0]

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            error.args = tuple(_OPTION.sub(argument, line) for line in error.args)
            raise

    return explained


def whole_number(name: str, value: object, *, least: int) -> int:
    """A whole number: an int of Python, numpy or torch.

    Raises:
        UserError: it is none, or too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise UserError(f"{name}: got {_shown(value)}; give a whole number, at least {least}")
    return number


def number(name: str, value: object) -> float:
    """A finite number.

    Raises:
        UserError: it is none.
    """
    try:
        found = math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{name}: got {_shown(value)}; give a number")
    return found


def numbers(name: str, values: object) -> tuple[float, ...]:
    """Finite numbers: a sequence, an array or a tensor of them.

    Raises:
        UserError: there are none, or one is no number.
    """
    wanted = "several numbers, for example [80, 0.8]"
    found = in_order(name, values, wanted)
    if not found:
        raise UserError(f"{name}: got {_shown(values)}; give {wanted}")
    return tuple(number(name, value) for value in found)


def in_order(name: str, values: object, wanted: str) -> list[Any]:
    """Values in an order: a sequence, an array, a tensor or a generator of them, but no set and no dict.

    Args:
        wanted: What they are, for the message.

    Raises:
        UserError: it is one value, or has no order.
    """
    try:
        without_order = isinstance(values, (str, bytes, Set, Mapping))
        found = None if without_order else list(values)  # type: ignore[call-overload]
    except TypeError:
        found = None
    if found is None:
        raise UserError(f"{name}: got {_shown(values)}; give {wanted}")
    return found


def truth(name: str, value: object) -> None:
    """Checks a value that is True or False, also numpy's.

    Raises:
        UserError: it is neither; Python takes `"no"` as true.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name}: got {_shown(value)}; give True or False")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Checks a value that is a word.

    Raises:
        UserError: it is none of the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name}: got {_shown(value)}; choose from {', '.join(choices)}")


def text(name: str, value: object) -> None:
    """Checks a value that is a string.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}: got {_shown(value)}; give a string")


def path(name: str, value: object) -> str:
    """A path or URL as a string, with the home folder in place of `~`.

    Raises:
        UserError: it is neither a string nor a path.
    """
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str) or "\0" in found:
        raise UserError(f"{name}: got {_shown(value)}; give a path or an s3:// URL")
    return str(Place(found))


def _shown(value: object) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
