"""Owns what every section of a config is: frozen, strict, of plain types with their bounds."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Counts = Annotated[tuple[Count, ...], AsTuple]


class Section(BaseModel):
    """A part of the config. Frozen; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def operational(default: Any, **constraints: Any) -> Any:
    """A field that may change between a run and its resumption: it moves no loss (beyond rounding)."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)
