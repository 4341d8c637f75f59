import pytest
import torch
from gaussian import Gaussian

from cmscale.config import EDM
from cmscale.consistency import grid
from cmscale.consistency.consistency_error import consistency_error


def drawn(data: Gaussian, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(count, len(data.mean), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return data.sample(count, seed=4), noise


@pytest.mark.parametrize("seed", range(5))
def test_the_true_function_has_no_error_along_the_teachers_trajectories(seed: int):
    data = Gaussian.random(6, seed)
    clean, noise = drawn(data)
    error = consistency_error(EDM(kind="edm"), data.consistency, clean, noise=noise, teacher=data.denoise, count=400)
    # what remains is the error of the trajectory's 399 Heun steps
    assert error.to_start.max() < 2e-4
    assert error.neighbours.max() < 2e-5


def test_a_function_that_is_not_constant_is_measured():
    """With f(x, t) = a(t), the distance between two times is |a(t) - a(s)| in every value."""
    clean = torch.zeros(3, 3, 4, 4)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.log1p(sigma).view(-1, 1, 1, 1).expand_as(x)

    error = consistency_error(EDM(kind="edm"), denoise, clean, noise=torch.ones_like(clean))
    level = torch.log1p(error.times.float())
    torch.testing.assert_close(error.neighbours, -level.diff()[:, None].expand(-1, 3), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(error.to_start, (level[0] - level)[:, None].expand(-1, 3), rtol=1e-4, atol=1e-6)


def test_without_a_teacher_trajectories_are_straight():
    seen: list[torch.Tensor] = []
    clean, noise = torch.rand(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append((x - clean) / sigma.view(-1, 1, 1, 1))
        return x

    error = consistency_error(EDM(kind="edm"), denoise, clean, noise=noise)
    assert len(seen) == 100
    for start in seen:
        torch.testing.assert_close(start, noise, rtol=0, atol=1e-3)
    assert torch.equal(error.times, grid.off_grid_times(EDM(kind="edm")).flip(0))
    assert error.neighbours.shape == (99, 2)
    assert (error.to_start[0] == 0).all()
