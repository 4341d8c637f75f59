"""Defines the base class of config sections, and the bounded types of their values."""

from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from cmscale.config.written import as_written
from cmscale.io.control_characters import has_control_characters

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Counts = Annotated[tuple[Count, ...], AsTuple]
AsWritten = BeforeValidator(as_written)
"""Makes a number the text that it is written as: for texts in lists, and outside of sections."""


def plain_text(text: str) -> str:
    """Refuses text that would end a line of a batch script, or that a terminal would not show.

    Raises:
        ValueError: it is empty, or holds a line break or another control character.
    """
    if not text.strip():
        raise ValueError("is empty; leave it out, or give a value")
    if has_control_characters(text, or_unseen=True):
        raise ValueError(f"got {text!r}; line breaks and control characters are not allowed")
    return text


class Section(BaseModel):
    """A section of the config: frozen, without unknown keys, without type conversion, its texts plain."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        """A number, for a key that takes text alone, as it is written."""
        if not isinstance(given, dict):
            return given
        texts = {name for name, field in cls.model_fields.items() if _is_text(field.annotation)}
        return {name: as_written(value) if name in texts else value for name, value in given.items()}

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, str) and value.isspace():
            raise ValueError("is empty; leave it out, or give a value")
        if isinstance(value, str) and has_control_characters(value):
            raise ValueError(f"got {value!r}; line breaks and control characters are not allowed")
        return value


def _is_text(annotation: Any) -> bool:
    """Whether a type is text alone, or text or null."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all((get_args(part)[0] if get_origin(part) is Annotated else part) in (str, NoneType) for part in parts)


def key(default: Any, description: str, *, unit: str = "", source: str = "", **constraints: Any) -> Any:
    """A field with what its user should know: `cmscale config explain`, editors and the reference page show it.

    Args:
        default: `...` for a key that must be given.
        description: What the value does, in whole sentences.
        unit: Of a number that has one: `px`, `steps`.
        source: Where the default comes from: a paper, released code, a reason. A key that changes the losses says it.
        constraints: Bounds, as `pydantic.Field` takes them.
    """
    return Field(default, description=description, json_schema_extra={"unit": unit, "source": source}, **constraints)


def operational(default: Any, description: str = "", *, unit: str = "", source: str = "", **constraints: Any) -> Any:
    """A `key` that may change when a run is resumed, as it does not change the losses (beyond rounding)."""
    extra = {"operational": True, "unit": unit, "source": source}
    return Field(default, description=description or None, json_schema_extra=extra, **constraints)
