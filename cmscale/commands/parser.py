"""Parses the command lines of scripts: argparse, with a `Use` for every option and one line for every mistake."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cmscale import __version__
from cmscale.commands.former import with_current_names
from cmscale.commands.use import Given, Use, given_twice, refuse_empty, refuse_repeated
from cmscale.errors import UserError
from cmscale.io.place import Place


@dataclass(frozen=True)
class Output:
    """Marks an option that names a file to write: it is checked before any work.

    Attributes:
        suffixes: The ends that the file's name may have; empty for any.
        local: What it is, if it can't be an object of a storage: `a lock file`.
    """

    suffixes: tuple[str, ...] = ()
    local: str = ""


class CommandParser(argparse.ArgumentParser):
    """A parser whose options are added by `add`.

    Raises (when it parses):
        UserError: a mistake in the command line, where argparse would print its usage and exit.
    """

    def __init__(self, *, prog: str, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_formatter(description))
        self.add_argument("--version", action="version", version=f"cmscale {__version__}")
        self.uses: dict[str, Use] = {}
        self._outputs: dict[str, Output] = {}
        self._actions_of: dict[str, argparse.Action] = {}
        self._texts: dict[str, list[list[str]]] = {}  # the values of each option as they were given, time by time

    def add(
        self, *names: str, use: Use, output: Output | None = None, group: Any = None, **how: Any
    ) -> argparse.Action:
        """Adds an option or a positional argument.

        Args:
            use: Where it is used.
            output: For a file that is written; its value is a `Place`.
            group: The argparse group that shows it.
            how: What `add_argument` takes; `type=Place` for a place.
        """
        if output is not None:
            how["type"] = Place
        if how.get("type") is Place:
            how["type"] = place
        action = (group or self).add_argument(*names, **how)
        self.uses[action.dest] = use
        if output is not None:
            self._outputs[action.dest] = output
        self._actions_of[action.dest] = action
        return action

    def read(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, Given]:
        """Parses the arguments. Options that need or exclude others are refused, outputs are checked.

        Raises:
            UserError: a mistake in the command line.
        """
        absent = object()  # a default, so that an option at its default value counts as given
        flags = {name: _called(action) for name, action in self._actions_of.items()}
        values = argparse.Namespace(
            **{name: absent for name, action in self._actions_of.items() if action.option_strings}
        )
        known = {flag for action in self._actions_of.values() for flag in action.option_strings}
        self._texts.clear()
        self.parse_intermixed_args(with_current_names(arguments, known), values)
        for name, texts in self._texts.items():
            if len(texts) > 1:
                values = [text for words in texts for text in words]
                both = "/".join(self._actions_of[name].option_strings)  # `--clip/--no-clip`
                raise given_twice(flags[name] if values else both, values)
        names = []
        for name, action in self._actions_of.items():
            value = getattr(values, name)
            if value is absent:
                setattr(values, name, action.default)
            elif action.option_strings or value not in (None, []):
                names.append(name)
                refuse_empty(flags[name], value)
                if isinstance(value, list):  # one of many arguments is named by itself
                    flags[name] = str(value[0])
                    refuse_repeated(map(str, value))
        given = Given(self.uses, flags, names)
        given.refuse_unused()
        for name, output in self._outputs.items():
            if getattr(values, name) is not None:
                check_output(flags[name], getattr(values, name), output)
        return values, given

    def error(self, message: str) -> Any:
        """Raises UserError."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Notes what is given for an option. argparse's own knows only the last."""
        if action.dest in self._actions_of and action.option_strings:
            self._texts.setdefault(action.dest, []).append(list(arg_strings))
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Prints the help. argparse's own hides that nobody reads it."""
        print(message, end="", file=file, flush=True)


def _called(action: argparse.Action) -> str:
    """What a user calls an option or argument: `--batch-size`, `KEY=VALUE`."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return action.option_strings[0]
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


def check_output(flag: str, place: Place, output: Output) -> None:
    """Raises UserError if the file that an option names can't be written; the line begins with the option."""
    try:
        if output.local:
            place.local(output.local)
        place.check_output(*output.suffixes)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def place(text: str) -> Place:
    """The parser of a place, for argparse."""
    try:
        return Place(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_number(least: int) -> Callable[[str], int]:
    """The parser of a whole number of at least `least`, for argparse."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; it should be a whole number of at least {least}")
        return int(text)

    return parse


def _formatter(description: str | None) -> type[argparse.HelpFormatter]:
    """Keeps the lines of a description of several lines."""
    return argparse.RawDescriptionHelpFormatter if description and "\n" in description else argparse.HelpFormatter
