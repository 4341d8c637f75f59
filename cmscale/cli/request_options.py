"""Builds typer commands from request models."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from cmscale.config.requests import Option, options_of
from cmscale.errors import UserError

R = TypeVar("R", bound=BaseModel)


def command_for(request: type[R]) -> Callable[[Callable[[R], None]], Callable[..., None]]:
    """Turns a function of a request into a function of the request's options, for `app.command`.

    Raises (when called):
        UserError: the values make no request.
    """

    def decorate(function: Callable[[R], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            values = {name: value for name, value in values.items() if value is not None}
            try:
                function(request.model_validate(values))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

        parameters = [_parameter(option) for option in options_of(request)]
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        return command

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
    info = typer.Option(option.flag, **shown) if option.flag else typer.Argument(**shown)
    default = None if option.is_list else option.default
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is ... else default,
        annotation=Annotated[kind, info],
    )
