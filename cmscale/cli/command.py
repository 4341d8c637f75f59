"""Builds typer commands whose options are refused where they have no effect, and whose places are checked.

    @command(app)
    def shrink(
        source: SourceArgument,
        out: Annotated[Place, typer.Option(help="..."), USED, Output((".npz",))],
        factor: Annotated[int, typer.Option(help="..."), Use(task=("superres",))] = 8,
        given: Given = GIVEN,
    ) -> None:

Every parameter has a `Use`. A `Place` is parsed, an `Output` checked before the function is called. The function gets
the options that were given as `given`, if it asks for them, and calls `given.refuse_unused` once it knows more.
"""

import copy
import functools
import inspect
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand
from typer.models import OptionInfo, ParameterInfo

from cmscale.cli.early import check_early
from cmscale.commands.parser import Output, check_output
from cmscale.commands.use import Given, Use, given_twice, refuse_empty, refuse_repeated
from cmscale.errors import UserError, printable
from cmscale.io.driver import refuse_cuda_without_driver
from cmscale.io.place import Place

F = TypeVar("F", bound=Callable[..., None])
GIVEN: Any = None
"""The default of a parameter `given`."""
COMMANDS: dict[str, dict[str, Use]] = {}
"""The options of every command, by its name, and where each is used."""

_WIDTH_OF_FILES = 250
"""Of the lines in a pipe or file."""
_METAVARS = {Place: "PATH", int: "N", float: "X", str: "TEXT"}
_ON_THE_COMMAND_LINE = ("COMMANDLINE", "ENVIRONMENT")


class TableConsole(Console):
    """Prints tables on stdout, into a pipe or file in wide lines.

    Rich itself would exit with status 1 if nobody reads them any more, and takes `[x]` for markup. A run's name may be
    anyone's: its escape sequences are written out.
    """

    def __init__(self) -> None:
        super().__init__(markup=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)

    def render_str(self, text: str, **how: Any) -> Text:
        """Text of a cell or line, without what a terminal would obey."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **how)

    def on_broken_pipe(self) -> None:
        """Leaves the ending to `guarded`."""
        raise BrokenPipeError


class _OnceCommand(TyperCommand):
    """A command that refuses an option that is given twice, where typer would take the last one.

    An option of several values (`list[...]`) may be repeated.
    """

    def make_parser(self, ctx: Any) -> Any:
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def once(args: list[str]) -> Any:
            words = list(args)  # parsing empties `args`
            found = parse(args)
            seen: set[str | None] = set()
            for each in found[2]:  # the parameters in the order in which they were given
                if each.param_type_name == "option" and not each.multiple and not each.is_eager:
                    if each.name in seen:
                        flag = "/".join((each.opts[-1], *each.secondary_opts))  # `--clip/--no-clip`
                        raise given_twice(flag, [] if each.is_flag else _values_of(each.opts, words))
                    seen.add(each.name)
            return found

        parser.parse_args = once
        return parser


def _values_of(flags: Sequence[str], words: Sequence[str]) -> list[str]:
    """The values that a command line gives an option, in order."""
    found = []
    for word, following in itertools.pairwise((*words, "")):
        name, equals, value = word.partition("=")
        if name in flags:
            found.append(value if equals else following)
    return found


@dataclass(frozen=True)
class _Declared:
    """A parameter of a command: as typer shows it, and what it is."""

    parameter: inspect.Parameter
    flag: str
    use: Use
    output: Output | None
    is_place: bool


def command(app: typer.Typer, name: str | None = None, *, group: str = "") -> Callable[[F], F]:
    """Registers a function as a command of `app`.

    Args:
        group: The command that `app` is reached by, if it is not the program itself.

    Raises:
        TypeError: a parameter has no `Use`.
    """

    def decorate(function: F) -> F:
        COMMANDS[f"{group} {name or function.__name__}".strip()] = {
            each.parameter.name: each.use for each in _declared(function)
        }
        app.command(name, cls=_OnceCommand)(_with_checks(function))
        return function

    return decorate


def _with_checks(function: Callable[..., None]) -> Callable[..., None]:
    declared = {each.parameter.name: each for each in _declared(function)}
    wants_given = "given" in inspect.signature(function).parameters

    def run(context: typer.Context, **values: Any) -> None:
        flags = {name: each.flag for name, each in declared.items()}
        sources = {name: context.get_parameter_source(name) for name in declared}
        names = [name for name, source in sources.items() if source and source.name in _ON_THE_COMMAND_LINE]
        for name in names:  # a message about one of many arguments names it
            if not declared[name].is_place:
                refuse_empty(flags[name], values[name])
            if isinstance(values[name], list) and values[name] and not flags[name].startswith("-"):
                refuse_repeated(values[name])
                flags[name] = str(values[name][0])
        given = Given({name: each.use for name, each in declared.items()}, flags, names)
        given.refuse_unused()
        for name, each in declared.items():
            values[name] = _checked(each, values[name])
        refuse_cuda_without_driver(values.get("device"))
        if "step" in values or "to" in values:
            check_early(values, given)
        function(**values, **({"given": given} if wants_given else {}))

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [each.parameter for each in declared.values()]
    run.__signature__ = inspect.Signature([context, *parameters])  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *parameters)}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def _declared(function: Callable[..., None]) -> Iterator[_Declared]:
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "given":
            continue
        kind, *marks = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else [None]
        use = next((mark for mark in marks if isinstance(mark, Use)), None)
        info = next((mark for mark in marks if isinstance(mark, ParameterInfo)), None)
        if use is None or info is None:
            raise TypeError(f"{function.__name__}: {name} needs a typer.Option or typer.Argument, and a Use")
        yield _Declared(
            parameter=parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[_as_text(kind), _with_metavar(info, kind)]
            ),
            flag=_flag(name, info),
            use=use,
            output=next((mark for mark in marks if isinstance(mark, Output)), None),
            is_place=_as_text(kind) != kind,
        )


def _with_metavar(info: ParameterInfo, kind: Any) -> ParameterInfo:
    """The option with a word for its value: PATH, N. Choices and switches need none."""
    if isinstance(info, OptionInfo) and info.metavar is None:
        single = next((part for part in _parts(kind) if part in _METAVARS), None)
        if single is not None:
            info = copy.copy(info)
            info.metavar = _METAVARS[single]
    return info


def _parts(kind: Any) -> Iterator[Any]:
    """A type, and the types that it is made of."""
    yield kind
    for part in get_args(kind):
        yield from _parts(part)


def _flag(name: str, info: ParameterInfo) -> str:
    if isinstance(info, OptionInfo):
        named = str(info.default).partition("/")[0]  # of `--clip/--no-clip`
        return named if named.startswith("--") else f"--{name.replace('_', '-')}"
    return info.metavar or name.upper()


def _as_text(kind: Any) -> Any:
    """The type as typer parses it: `str` in place of `Place`."""
    if kind is Place:
        return str
    if get_origin(kind) is list:
        return list[_as_text(get_args(kind)[0])]
    if get_origin(kind) in (Union, types.UnionType):
        return functools.reduce(operator.or_, (_as_text(part) for part in get_args(kind)))
    return kind


def _checked(declared: _Declared, value: Any) -> Any:
    if not declared.is_place or value is None:
        return value
    try:
        if isinstance(value, list):
            return [Place(text) for text in value]
        found = Place(value)
    except UserError as error:
        raise UserError(f"{declared.flag} {error}") from None
    if declared.output is not None:
        check_output(declared.flag, found, declared.output)
    return found
