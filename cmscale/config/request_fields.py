"""Declares the fields of requests as options of command lines: what help, checks and parsers need beside the type."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cmscale.commands.parser import Output
from cmscale.commands.use import Use
from cmscale.io.place import Place


def option(
    default: Any,
    help: str,
    *,
    use: Use,
    metavar: str = "",
    flag: str = "",
    output: Output | None = None,
    is_positional: bool = False,
    negatable: bool = False,
    **constraints: Any,
) -> Any:
    """A field with what its option shows. A field of type `Place` is a local path or URL.

    Args:
        use: Where the option is used.
        flag: The option's name, where it is not the field's.
        output: For a file that is written.
        is_positional: Whether it is an argument without a flag.
        negatable: Whether a switch has an opposite: `--clip` and `--no-clip`.
    """
    extra = {"use": use, "metavar": metavar, "flag": flag, "output": output, "is_positional": is_positional}
    extra["negatable"] = negatable
    return Field(default, description=help, json_schema_extra=extra, **constraints)


@dataclass(frozen=True)
class Option:
    """A field of a request as an option of a command line.

    Attributes:
        name: The field's.
        flag: `--checkpoint`; empty for an argument without a flag.
        use: Where the option is used.
        kind: Type of one value: int, str, Place, or bool for a switch.
        is_list: Whether it takes any number of values.
        minimum: The smallest number allowed; None if there is none.
        choices: The values allowed; empty if there is no list.
        default: `...` for an argument that must be given.
        output: For a file that is written.
        negatable: Whether a switch has an opposite, `--no-clip`.
    """

    name: str
    flag: str
    use: Use
    kind: type
    is_list: bool
    minimum: int | None
    choices: tuple[str, ...]
    default: Any
    help: str
    metavar: str
    output: Output | None
    negatable: bool

    @property
    def is_path(self) -> bool:
        """Whether the value is a local path or a URL. That of --sampling-times may be numbers."""
        return self.kind is Place


def options_of(request: type[BaseModel]) -> Iterator[Option]:
    """The options that a user can give, positional arguments first."""
    fields = [(name, field) for name, field in request.model_fields.items() if field.json_schema_extra is not None]
    for name, field in sorted(fields, key=lambda item: not _extra(item[1])["is_positional"]):
        extra = _extra(field)
        kind = _single(field.annotation)
        choices = tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()
        minimum = next((each.ge for each in field.metadata if hasattr(each, "ge")), None)
        yield Option(
            name=name,
            flag="" if extra["is_positional"] else f"--{(extra['flag'] or name).replace('_', '-')}",
            use=extra["use"],
            kind=str if choices or kind not in (int, str, bool, Place) else kind,
            is_list=get_origin(field.annotation) is list,
            minimum=minimum,
            choices=choices,
            default=... if field.default is PydanticUndefined else field.default,
            help=field.description or "",
            metavar=extra["metavar"],
            output=extra["output"],
            negatable=extra["negatable"],
        )


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return dict(field.json_schema_extra)


def _single(annotation: Any) -> Any:
    """The type of one value: `int` of `int | None`, `str` of `list[str]`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _single(next(part for part in get_args(annotation) if part is not types.NoneType))
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    return annotation
