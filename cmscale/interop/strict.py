"""Owns the check that foreign weights are exactly the configured network's, and what is said if not."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cmscale.errors import UserError

SHOWN = 3


def strict_weights(
    found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], *, origin: str
) -> dict[str, Tensor]:
    """The tensors under the expected names, in their order, float32 on the CPU.

    Raises:
        UserError: a name is missing or not expected, or no dense floating-point tensor of that shape.
    """
    problems = [
        *_listed("missing", (name for name in expected if name not in found)),
        *_listed("unexpected", (str(name) for name in found if name not in expected)),
        *_listed("of the wrong shape", _misshaped(found, expected)),
    ]
    if problems:
        raise UserError(
            f"{origin}: not the weights of the network in the config's model section: {'; '.join(problems)}"
        )
    return {name: found[name].detach().to("cpu", torch.float32).contiguous() for name in expected}


def _misshaped(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    for name, shape in expected.items():
        if name not in found:
            continue
        tensor = found[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            yield f"{name} (no dense floating-point tensor)"
        elif tuple(tensor.shape) != shape:
            yield f"{name} {list(tensor.shape)}, not {list(shape)}"


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what}: {', '.join(names[:SHOWN])}{more}"]
