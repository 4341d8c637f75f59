"""The application of the command `cmscale`: all groups of commands."""

from functools import cache
from typing import Any

import typer

from cmscale.cli import configs, evaluation, facts, runs, sampling, weights
from cmscale.errors import UserError

# Commands import torch when they are called, so that `cmscale --help` and `cmscale runs` answer at once.

HELP = "The `cmscale` command. A user's mistake is one line and exit status 2; a fault exits with 1."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
for group in (sampling, evaluation, weights, runs, configs, facts):
    app.add_typer(group.app)


def run(arguments: list[str]) -> int:
    """Runs a command line of `cmscale`. Returns its exit status.

    Raises:
        UserError: a mistake in the command line, or one that the command found.
    """
    try:
        with _program().make_context("cmscale", arguments) as context:
            _program().invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except typer.TyperException as error:
        text = error.format_message()
        if not arguments:  # the help was printed
            return 2
        raise UserError(f"{text.rstrip('.')} (see {_help_of(arguments)})") from None
    return 0


@cache
def _program() -> Any:
    """The application as a click command. `app()` would print usage errors in boxes and end the process by itself."""
    return typer.main.get_command(app)


def _help_of(arguments: list[str]) -> str:
    words = ["cmscale"]
    commands = _program().commands
    for argument in arguments:
        if argument not in commands:
            break
        words.append(argument)
        commands = getattr(commands[argument], "commands", {})
    return f"{' '.join(words)} --help"
