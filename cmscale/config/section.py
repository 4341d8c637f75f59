"""Defines the base class of config sections, and the bounded types of their values."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Counts = Annotated[tuple[Count, ...], AsTuple]


class Section(BaseModel):
    """A section of the config: frozen, without unknown keys, without type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def operational(default: Any, **constraints: Any) -> Any:
    """A field that may change when a run is resumed, as it does not change the losses (beyond rounding)."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)
