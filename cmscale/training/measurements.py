"""Averages what a training step measures per image: over the batch, and over each quarter of its noise levels."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cmscale.distributed import collectives
from cmscale.rng import SampleRandomness

QUARTILES = 4


@dataclass
class Measurements:
    """The quantities of one step, by name.

    Every method's time is an increasing function of the image's uniform number. Quarters of that number are therefore
    the quartiles of the noise that the method trains at: 1 has the least noise, 4 the most.
    """

    active: bool = False
    _quartile: Tensor = field(default_factory=lambda: torch.zeros(0))
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, *, active: bool) -> None:
        """Starts a step. If it is not active, nothing is computed."""
        self.active = active
        self._sums = {}

    def micro_batch(self, random: SampleRandomness) -> None:
        """The randomness of the images that the next quantities belong to."""
        if self.active:
            number = (random.uniform() * QUARTILES).long().clamp(max=QUARTILES - 1)
            self._quartile = F.one_hot(number, QUARTILES).double()  # [B, 4]

    def add(self, name: str, values: Tensor) -> None:
        """Adds a quantity of the micro-batch, [B]."""
        if self.active:
            both = torch.stack([values.detach().double(), torch.ones_like(values, dtype=torch.float64)])
            sums = both @ self._quartile.to(values.device)  # [2, 4]: sums and counts
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def means(self) -> dict[str, float | None]:
        """Of each quantity NAME its mean, and NAME_q1 to NAME_q4; None without images in the quarter. Collective."""
        if not self.active:
            return {}
        found: dict[str, float | None] = {}
        by_rank = collectives.gather({name: sums.tolist() for name, sums in self._sums.items()})
        for name in self._sums:
            sums, counts = torch.tensor([of_rank[name] for of_rank in by_rank], dtype=torch.float64).sum(0)
            found[name] = float(sums.sum() / counts.sum())
            for quartile, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True), start=1):
                found[f"{name}_q{quartile}"] = total / count if count else None
        return found
