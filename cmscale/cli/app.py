"""The application of the command `cmscale`: all groups of commands."""

import functools
import itertools
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from pydantic import ValidationError

from cmscale import __version__
from cmscale.cli import comparing, configs, editing, evaluation, facts, one_run, runs, sampling, weights
from cmscale.cli.command import command
from cmscale.commands.former import with_current_names
from cmscale.commands.use import USED
from cmscale.config.wording import what_is_wrong
from cmscale.errors import UserError

# Commands import torch when they are called, so that `cmscale --help` and `cmscale runs` answer at once.

NAME = "cmscale"
COMPLETE = "_CMSCALE_COMPLETE"
"""The variable by which a completion script asks."""
_TRAINS = "training starts with `python launchers/submit.py CONFIG` in the checkout (-h shows its options)"
_PREPARES = "data are prepared with `python data_prep/prepare.py` in the checkout (-h shows its options)"
_ELSEWHERE = {
    **dict.fromkeys(("train", "submit", "resume"), _TRAINS),
    "prepare": _PREPARES,
    "help": "`cmscale --help` lists commands, `cmscale COMMAND --help` the options of one",
    "version": "`cmscale --version` prints it",
}
_SUMMARIES = {
    "completion": "Prints the completion script of a shell.",
    "sample": "Draws samples to an .npz, PNG files or tars.",
    "edit": "Inpaints, colours, enlarges, ... images.",
    "evaluate": "Measures FID, IS, KID, precision, recall and more.",
    "search-times": "Finds the noise levels of sampling in several steps.",
    "consistency-error": "Measures how consistent a model is along trajectories.",
    "export": "Writes weights for other programs, or to publish.",
    "import": "Converts other projects' weights to safetensors.",
    "ema": "Computes an average of a run's weights of any length.",
    "verify": "Checks checkpoints and exported weights.",
    "report": "Builds or serves the page of a run.",
    "mirror": "Sends what wandb, TensorBoard, Prometheus lack.",
    "runs": "Lists runs: state, step, time left, best score.",
    "compare": "Compares scores, curves and configs of runs.",
    "schema": "Prints the JSON Schema of configs, for editors.",
    "config": "Explains keys of configs, compares configs.",
    "doctor": "Tries what this machine, or a job's nodes, offer.",
    "estimate": "Counts memory, time, price and storage of a config.",
}
"""What each command does, in a line of a terminal of 80 columns."""
HELP = "The `cmscale` command. A user's mistake is one line and exit status 2; a fault exits with 1."
app = typer.Typer(
    add_completion=False,  # `completion` is a command
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help=HELP,
    epilog="Training: python launchers/submit.py -h. Evaluation on a cluster: python launchers/evaluate.py -h.",
)
for group in (sampling, editing, evaluation, weights, one_run, runs, comparing, configs, facts):
    app.add_typer(group.app)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the release and exit; after a command, too.")
    ] = False,
) -> None:
    del version  # see `run`


@command(app)
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Your shell."), USED],
) -> None:
    """Prints the shell's completion of this command: eval "$(cmscale completion bash)"."""
    from typer.completion import get_completion_script

    print(get_completion_script(prog_name=NAME, complete_var=COMPLETE, shell=shell))


def complete(instruction: str) -> int:
    """Answers the completion script, which asks by variables of the environment. Returns an exit status."""
    from typer.completion import completion_init, shell_complete

    completion_init()
    return shell_complete(_program(), {}, NAME, COMPLETE, instruction)


def run(arguments: list[str]) -> int:
    """Runs a command line of `cmscale`. Returns its exit status.

    Raises:
        UserError: a mistake in the command line, or one that the command found.
    """
    if "--version" in arguments[: arguments.index("--") if "--" in arguments else None]:
        print(f"{NAME} {__version__}")
        return 0
    arguments = with_current_names(arguments, _flags_of(arguments))
    found, words = _found(arguments)
    is_group_alone = hasattr(found, "commands") and words == [NAME, *arguments]
    if is_group_alone:
        arguments = [*arguments, "--help"]
    try:
        with _program().make_context(NAME, list(arguments)) as context:
            _program().invoke(context)
    except typer.Exit as ended:
        return 2 if is_group_alone else ended.exit_code
    except typer.TyperException as error:
        text = _told(error)
        if arguments[0] in _ELSEWHERE:
            raise UserError(f"{arguments[0]}: is no command here; {_ELSEWHERE[arguments[0]]}") from None
        if swapped := _with_command_first(arguments):
            raise UserError(f"{arguments[0]}: is no command; did you mean: {swapped}?") from None
        if (swapped := _with_choice_first(arguments)) != arguments:
            meant = shlex.join([NAME, *swapped])
            raise UserError(f"{arguments[1]}: stands too early; did you mean: {meant}?") from None
        raise UserError(f"{text.rstrip('.')} (see {_help_of(arguments)})") from None
    return 0


def _with_command_first(arguments: list[str]) -> str:
    """What is meant by `cmscale RUN sample ...`, or by a path alone; empty if it can't be seen."""
    first, *rest = arguments
    if first in _program().commands or first.startswith("-"):
        return ""
    if rest and rest[0] in _program().commands:
        return shlex.join([NAME, *_with_choice_first([rest[0], first, *rest[1:]])])
    return f"{NAME} COMMAND {shlex.quote(first)}" if "/" in first or Path(first).exists() else ""


def _with_choice_first(arguments: list[str]) -> list[str]:
    """What is meant by `edit RUN inpaint ...`: the one word that a command's first argument can be comes first."""
    command, *rest = arguments
    parameters = getattr(_program().commands.get(command), "params", None)
    choices = get_args(parameters[0].get_runtime_param().annotation) if parameters else ()
    before_options = itertools.takewhile(lambda word: not word.startswith("-"), rest)  # whose values may be such words
    among = [word for word in before_options if word in choices]
    if len(among) != 1 or rest[0] == among[0]:
        return arguments
    rest.remove(among[0])
    return [command, *among, *rest]


def _told(error: Any) -> str:
    """A mistake in a command line, in words and with its value where pydantic found it."""
    if isinstance(error.__cause__, ValidationError):
        first = error.__cause__.errors()[0]
        if first["type"] != "value_error":
            error.message = what_is_wrong(dict(first))
    return error.format_message().replace("Value error, ", "")


@cache
def _program() -> Any:
    """The application as a click command. `app()` would print usage errors in boxes and end the process by itself."""
    program: Any = typer.main.get_command(app)
    _with_plain_arguments(program)
    for name, summary in _SUMMARIES.items():
        program.commands[name].short_help = summary
    return program


def _with_plain_arguments(program: Any) -> None:
    """Has the help name arguments by their metavars alone; typer would add `<str>`, and braces in the usage."""
    for parameter in program.params:
        if parameter.param_type_name == "argument":
            parameter.metavar = parameter.metavar or parameter.name.upper()
            parameter.display_type_rich = functools.partial(_choices, parameter.display_type_rich)
            parameter.get_usage_pieces = functools.partial(_in_usage, parameter)
    for inner in getattr(program, "commands", {}).values():
        _with_plain_arguments(inner)


def _in_usage(argument: Any, context: Any) -> list[str]:
    """How the first line of a help names an argument: in brackets if it may be left out."""
    del context
    return [argument.metavar if argument.required or "[" in argument.metavar else f"[{argument.metavar}]"]


def _choices(described: Callable[..., str], **context: Any) -> str:
    """What typer says of a type, if these are choices."""
    found = described(**context) or ""
    return found if "|" in found else ""


def _found(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and these words."""
    found, words = _program(), [NAME]
    for argument in arguments:
        inner = getattr(found, "commands", {}).get(argument)
        if inner is None:
            break
        found = inner
        words.append(argument)
    return found, words


def _help_of(arguments: list[str]) -> str:
    return f"{' '.join(_found(arguments)[1])} --help"


def _flags_of(arguments: list[str]) -> set[str]:
    """The options of the command that is called."""
    return {flag for parameter in _found(arguments)[0].params for flag in parameter.opts + parameter.secondary_opts}
