"""Defines the base class of config sections, and the bounded types of their values."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Counts = Annotated[tuple[Count, ...], AsTuple]


class Section(BaseModel):
    """A section of the config: frozen, without unknown keys, without type conversion."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
