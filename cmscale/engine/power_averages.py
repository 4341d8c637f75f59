"""Computes averages by a power function of any length from those that a run kept (Karras et al. 2024, section 3.2).

The weights that an average gives to the steps are a profile, p(s) = (gamma + 1) s^gamma / t^(gamma + 1) for s <= t. The
profile of the wanted length is approximated by a linear combination of the kept ones; the same combination of the kept
weights is the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cmscale.config.averages import LONGEST, SHORTEST, length_of, power_exponent, power_name
from cmscale.engine.checkpoint_reader import list_checkpoints, read_flat, read_manifest, size_of
from cmscale.errors import UserError
from cmscale.io import traffic
from cmscale.io.storage import open_storage

TOLERATED = 0.1
"""Of the distance between the profiles, relative to the wanted one."""


@dataclass(frozen=True)
class Profile:
    """An average with exponent gamma at step t."""

    exponent: float
    step: int


@dataclass(frozen=True)
class Kept:
    """An average that a checkpoint or a snapshot of the run holds."""

    url: str
    name: str
    profile: Profile


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles over the steps; Karras et al. 2024, appendix C."""
    least = min(a.step, b.step)
    scale = (a.exponent + 1) * (b.exponent + 1) / (a.exponent + b.exponent + 1) / least
    return scale * (least / a.step) ** (a.exponent + 1) * (least / b.step) ** (b.exponent + 1)


def combination(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The coefficients, of sum 1, whose combination of the kept profiles is nearest to the wanted one.

    Returns:
        The coefficients, float64, and the distance of the combination from the wanted profile, relative to its norm.
    """
    count = len(kept)
    scales = np.array([inner_product(each, each) ** -0.5 for each in kept])  # of profiles of norm 1
    products = np.array([[inner_product(a, b) for b in kept] for a in kept]) * np.outer(scales, scales)
    targets = np.array([inner_product(each, wanted) for each in kept]) * scales
    system = np.block([[products, scales[:, None]], [scales[None], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(targets, 1.0), rcond=None)[0][:count]
    square = inner_product(wanted, wanted) - 2 * solution @ targets + solution @ products @ solution
    return solution * scales, float(np.sqrt(max(square, 0.0) / inner_product(wanted, wanted)))


def kept_averages(run: str, *, step: int) -> list[Kept]:
    """The averages by a power function in the checkpoints and snapshots of a run up to `step`, each step's once."""
    found: dict[tuple[int, str], Kept] = {}
    for within in ("snapshots", "checkpoints"):
        for listed in list_checkpoints(run, within=within):
            if 0 < listed.step <= step:
                for name in read_manifest(open_storage(listed.url)).quantities:
                    if (length := length_of(name)) is not None:
                        profile = Profile(power_exponent(length), listed.step)
                        found[listed.step, name] = Kept(listed.url, name, profile)
    return list(found.values())


def error_of(kept: Sequence[Kept], length: float, *, step: int) -> float:
    """The distance from the profile of a length of what can be combined from the kept ones; 1 if none are kept."""
    if not kept:
        return 1.0
    return combination([each.profile for each in kept], Profile(power_exponent(length), step))[1]


def reconstructed(run: str, length: float, *, step: int) -> torch.Tensor:
    """The average of a length at a step, in the flat space of the run's network, float32.

    Raises:
        UserError: no length of an average; the run keeps none, or too few; or a file of them is damaged.
    """
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"{power_name(length)}: the length must be between {SHORTEST:g} and {LONGEST:g}")
    kept = kept_averages(run, step=step)
    if not kept:
        raise UserError(f"{run}: keeps no averages by a power function; train with ema.lengths=[0.05,0.1]")
    wanted = Profile(power_exponent(length), step)
    coefficients, distance = combination([each.profile for each in kept], wanted)
    if distance > TOLERATED:
        steps = len({each.profile.step for each in kept})
        raise UserError(
            f"{power_name(length)}: the averages that {run} keeps, of {steps} steps, give it with an error of "
            f"{distance:.0%}; give a length nearer to theirs, or train with a smaller ema.snapshot_every"
        )
    total: torch.Tensor | None = None
    sizes = {each.url: size_of(each.url) for each in kept}
    with traffic.showing(f"reading {len(kept)} averages", sum(sizes[each.url] for each in kept)):
        for each, coefficient in zip(kept, coefficients, strict=True):
            part = float(coefficient) * read_flat(each.url, each.name).double()
            total = part if total is None else total.add_(part)
    assert total is not None
    return total.float()
