"""Defines what every command on a SOURCE that is asked by a request has: the source, its config, the device.

A request's fields are the options of its command (`options_of`), so that an option exists once. The fields that are set
are the options that were given: `refuse_unused` refuses those that have no effect.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cmscale.commands.situation import GIVEN_CONFIG, WITHOUT_CONFIG, overriding
from cmscale.commands.use import USED, Given, Use
from cmscale.config.request_fields import option, options_of
from cmscale.config.wording import what_is_wrong
from cmscale.errors import UserError
from cmscale.io.place import Place

R = TypeVar("R", bound="SourceRequest")


class SourceRequest(BaseModel):
    """Which network is used. None leaves a value to the config of the source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Place = option(
        ...,
        "A run, a checkpoint, an exported file or folder, or an OpenAI .pt; a local path or s3://.",
        use=USED,
        metavar="SOURCE",
        is_positional=True,
    )
    overrides: list[str] = option(
        [],
        "Values of --config to replace.",
        use=Use(overriding=(GIVEN_CONFIG,)),
        metavar="[KEY=VALUE]...",
        is_positional=True,
    )
    config: Place | None = option(
        None, "Config of a SOURCE that has none (OpenAI .pt, ...).", use=Use(source=WITHOUT_CONFIG), metavar="CONFIG"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto uses CUDA if there is a device.", use=USED)

    def refuse_unused(self, **situation: str) -> None:
        """Refuses options that were given and have no effect.

        Args:
            situation: See `cmscale.commands.use`: `source` (the kind of SOURCE), `features`.

        Raises:
            UserError: the first such option, and where it would be used.
        """
        options = {option.name: option for option in options_of(type(self))}
        flags = {name: option.flag or option.metavar for name, option in options.items()}
        if self.overrides:
            flags["overrides"] = self.overrides[0]
        given = [name for name in options if name in self.model_fields_set and getattr(self, name) not in (None, [])]
        uses = {name: option.use for name, option in options.items()}
        Given(uses, flags, given).refuse_unused(**situation, overriding=overriding(self.config, self.overrides))


def request_from(model: type[R], values: Mapping[str, Any]) -> R:
    """The request with these values, which are the options that were given.

    Raises:
        UserError: a value is not allowed; the line begins with its option.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        flag = next((option.flag for option in options_of(model) if option.name == name), "") or name
        why = first["ctx"]["error"] if first["type"] == "value_error" else what_is_wrong(dict(first))
        raise UserError(f"{flag}: {why}") from None
