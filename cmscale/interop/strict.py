"""Checks that weights are exactly those of the configured network."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmscale.errors import UserError

T = TypeVar("T")
_WRAPPERS = ("module.", "_orig_mod.")
MAX_NAMES = 3  # per problem in a message


def strict_weights(
    found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], *, origin: str
) -> dict[str, Tensor]:
    """The tensors in the order of the expected names, float32 on the CPU.

    Args:
        expected: Shape of each parameter by name.
        origin: What is checked, for messages.

    Raises:
        UserError: a name is missing or unexpected, or is not a dense floating-point tensor of that shape.
    """
    problems = [
        *_listed("missing", (name for name in expected if name not in found)),
        *_listed("unexpected", (str(name) for name in found if name not in expected)),
        *_listed("of the wrong shape", _misshaped(found, expected)),
    ]
    if problems:
        raise UserError(
            f"{origin}: do not fit the config's model section ({'; '.join(problems)}); give the config of these weights"
        )
    weights: dict[str, Tensor] = {}
    places: set[int] = set()
    for name in expected:
        tensor = found[name].detach().to("cpu", torch.float32).contiguous()
        weights[name] = tensor.clone() if tensor.data_ptr() in places else tensor  # equal ones may be stored once
        places.add(weights[name].data_ptr())
    return weights


def without_wrappers(found: Mapping[Any, T]) -> dict[Any, T]:
    """The values by their names without what torch's DistributedDataParallel and torch.compile put before all."""
    for wrapper in _WRAPPERS * 2:  # one may hold the other
        if found and all(str(name).startswith(wrapper) for name in found):
            found = {str(name).removeprefix(wrapper): value for name, value in found.items()}
    return dict(found)


def _misshaped(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    for name, shape in expected.items():
        if name not in found:
            continue
        tensor = found[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            yield f"{name} (not a dense floating-point tensor)"
        elif tuple(tensor.shape) != shape:
            yield f"{name} {list(tensor.shape)}, not {list(shape)}"


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return [f"{what}: {', '.join(names[:MAX_NAMES])}{more}"]
