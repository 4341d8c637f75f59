"""The loss of EDM: weighted denoising score matching (Karras et al. 2022, section 5)."""

from dataclasses import dataclass

from torch import Tensor

from cmscale.config import EDM
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency import grid
from cmscale.consistency.distance import Distance
from cmscale.consistency.networks import Networks
from cmscale.consistency.solver import evaluate, expand_as
from cmscale.rng import SampleRandomness


@dataclass(frozen=True)
class EDMLoss:
    """lambda(s) d(D(x + s z, s), x), lambda = 1/s^2 + 1/sd^2, ln s ~ N(Pm, Ps^2); EDM, section 5.

    d is the mean square over the image, as in the released code.
    """

    method: EDM
    distance: Distance

    def __call__(self, networks: Networks, clean: Tensor, values: ScheduleValues, random: SampleRandomness) -> Tensor:
        del values
        sigma = grid.lognormal_time(random.uniform(), p_mean=self.method.p_mean, p_std=self.method.p_std)
        noise = random.noise(clean.shape[1:]).to(clean)
        noisy = clean + expand_as(sigma, clean) * noise
        denoised = evaluate(networks.student, noisy, sigma, dropout_keys=random.dropout_keys())
        weight = 1 / sigma**2 + 1 / self.method.sigma_data**2
        return weight.to(clean) * self.distance(denoised, clean)
