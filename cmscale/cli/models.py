"""Reads the model of a command's SOURCE."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cmscale.commands.use import Given
from cmscale.io.place import Place

if TYPE_CHECKING:
    from cmscale.source import Source


def load_model(
    source: Place,
    *,
    given: Given,
    weights: str | None,
    step: str,
    config: str | None,
    overrides: Sequence[str] | None,
    **situation: str,
) -> "Source":
    """Reads SOURCE with the values of the options that choose in it.

    Args:
        given: The options that were given; those without an effect are refused before weights are read.
        situation: What else is known of the situation: see `cmscale.commands.use`.

    Raises:
        UserError: there is no such source, or an option has no effect on it.
    """
    from cmscale.commands.situation import overriding
    from cmscale.source import checkpoint_step, load_source, model_kind

    given.refuse_unused(source=model_kind(source), overriding=overriding(config, overrides or ()), **situation)
    return load_source(
        source, weights=weights, step=checkpoint_step(step), config=config, overrides=list(overrides or [])
    )
