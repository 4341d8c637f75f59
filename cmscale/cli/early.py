"""Finds mistakes about a command's SOURCE before torch is imported, which takes seconds."""

from collections.abc import Mapping
from typing import Any

from cmscale.commands import situation
from cmscale.commands.use import Given
from cmscale.config.sampling_times import parse_step
from cmscale.errors import UserError
from cmscale.runs.choices import check_model, check_times
from cmscale.runs.source_kind import kind_of_source


def check_early(values: Mapping[str, Any], given: Given) -> None:
    """Checks what the values of a command ask of its SOURCE, if it has one.

    Raises:
        UserError: there is no such source, checkpoint, weights or config, or an option has no effect on the source.
    """
    source = values.get("source")
    if source is None or source.is_remote:
        return
    kind = kind_of_source(source)
    given.refuse_unused(source=kind)
    if kind == situation.SAMPLES or ("to" in values and values["to"] is None):  # not a model, or not read as one
        return
    overrides = values.get("overrides") or []
    config = check_model(
        source,
        steps=(_step(values.get("step", "latest")),),
        weights=(values.get("weights"),),
        config=values.get("config"),
        overrides=overrides,
    )
    if config is not None and values.get("times") is not None:
        check_times(values["times"], config.method)


def _step(text: str) -> int | None:
    try:
        return parse_step(text)
    except ValueError as error:
        raise UserError(f"--checkpoint: {error}") from None
