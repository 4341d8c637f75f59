"""Builds typer commands from request models."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import typer

from cmscale.cli.command import GIVEN
from cmscale.commands.use import Given
from cmscale.config.request_fields import Option, options_of
from cmscale.config.source_request import SourceRequest, request_from
from cmscale.runs.requested import check_request

R = TypeVar("R", bound=SourceRequest)


def command_for(request: type[R]) -> Callable[[Callable[[R], None]], Callable[..., None]]:
    """Turns a function of a request into a function of the request's options, for `command`.

    Raises (when called):
        UserError: the values make no request.
    """

    def decorate(function: Callable[[R], None]) -> Callable[..., None]:
        def asked(*, given: Given = GIVEN, **values: Any) -> None:
            asked_for = request_from(request, {name: values[name] for name in given})
            check_request(asked_for)  # before torch is imported, which takes seconds
            function(asked_for)

        own = inspect.signature(asked).parameters["given"]
        parameters = [*(_parameter(option) for option in options_of(request)), own]
        asked.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        asked.__name__ = function.__name__
        asked.__doc__ = function.__doc__
        return asked

    return decorate


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = option.kind
    if option.choices:
        kind = Literal[option.choices]
    if option.is_list:
        kind = list[str]
    if option.default is None or option.is_list:
        kind = kind | None
    shown: dict[str, Any] = {"help": option.help}
    if option.metavar:
        shown["metavar"] = option.metavar
    if option.minimum is not None:
        shown["min"] = option.minimum
    flag = f"{option.flag}/--no-{option.flag.removeprefix('--')}" if option.negatable else option.flag
    info = typer.Option(flag, **shown) if flag else typer.Argument(**shown)
    marks = (info, option.use) if option.output is None else (info, option.use, option.output)
    default = None if option.is_list else option.default
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is ... else default,
        annotation=Annotated[kind, *marks],
    )
