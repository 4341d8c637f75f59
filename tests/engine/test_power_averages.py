"""Averages by a power function: their weights, the snapshots of a run, and other lengths computed from them."""

from pathlib import Path

import pytest
import torch
from flat_state import StandIn, flat_config, ranks_of

from cmscale.config import Config
from cmscale.config.averages import LONGEST, SHORTEST, length_of, power_exponent, power_name, power_rate
from cmscale.config.schedules import ScheduleValues
from cmscale.engine.checkpoint import Checkpoints
from cmscale.engine.checkpoint_reader import list_checkpoints, verify_checkpoint
from cmscale.engine.fence import claim_generation
from cmscale.engine.power_averages import Profile, combination, error_of, inner_product, kept_averages, reconstructed
from cmscale.errors import UserError
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import TrainState

STEPS = 400
AVERAGES = ("ema.lengths=[0.05,0.1]", "checkpoint.keep_last=1")


def weights_of(length: float, step: int) -> torch.Tensor:
    """The weight of each of the steps 1..step in an average: s^(gamma + 1) - (s - 1)^(gamma + 1), of sum 1."""
    ends = (torch.arange(step + 1, dtype=torch.float64) / step) ** (power_exponent(length) + 1)
    return ends.diff()


def walk(steps: int, size: int) -> torch.Tensor:
    """Master weights of every step: a random walk around a slow curve, [steps, size] float64."""
    noise = torch.randn(steps, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    curve = torch.linspace(0, 3, steps, dtype=torch.float64)[:, None].sqrt()
    return curve + 0.05 * noise.cumsum(0) + 0.3 * noise


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_exponents_are_the_published_ones(length: float, exponent: float):
    assert power_exponent(length) == pytest.approx(exponent, abs=5e-3)


@pytest.mark.parametrize("length", [SHORTEST, 0.03, 0.05, 0.1, 0.2, LONGEST])
def test_a_length_is_the_standard_deviation_of_the_profile(length: float):
    weights, times = weights_of(length, 100_000), torch.arange(100_000, dtype=torch.float64) / 100_000
    mean = (weights * times).sum()
    assert (weights * (times - mean) ** 2).sum().sqrt() == pytest.approx(length, rel=1e-3)
    assert length_of(power_name(length)) == length


def test_names_of_other_weights_have_no_length():
    assert [length_of(name) for name in ("master", "ema_0.9999", "power_", "power_2", "power_0.1x")] == [None] * 5


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_updates_by_the_rates_give_the_weights_of_the_profile(length: float):
    values, average = walk(STEPS, 3), torch.full((3,), 7.0, dtype=torch.float64)
    for step, value in enumerate(values, start=1):
        average = average.lerp(value, 1 - power_rate(power_exponent(length), step))
    torch.testing.assert_close(average, weights_of(length, STEPS) @ values, rtol=1e-12, atol=1e-12)


def test_inner_products_are_the_integrals_of_the_profiles():
    a, b = Profile(16.97, 700), Profile(6.94, 1000)
    times = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200  # 0 to 1000

    def profile(of: Profile) -> torch.Tensor:
        found = (of.exponent + 1) * (times / of.step) ** of.exponent / of.step
        return torch.where(times < of.step, found, 0.0)

    for one, other in ((a, b), (b, a), (a, a)):
        assert inner_product(one, other) == pytest.approx((profile(one) * profile(other)).sum().item() / 200, rel=1e-5)


@pytest.mark.parametrize(("length", "largest"), [(0.02, 3e-2), (0.03, 1e-2), (0.07, 1e-3), (0.15, 2e-3), (0.25, 3e-2)])
def test_other_lengths_are_combined_from_two_averages_of_forty_snapshots(length: float, largest: float):
    kept = [Profile(power_exponent(tracked), step) for tracked in (0.05, 0.1) for step in range(1000, 40_001, 1000)]
    coefficients, distance = combination(kept, Profile(power_exponent(length), 40_000))
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert distance < largest
    combined = torch.zeros(40_000, dtype=torch.float64)
    for coefficient, each in zip(coefficients, kept, strict=True):
        ends = (torch.arange(each.step + 1, dtype=torch.float64) / each.step) ** (each.exponent + 1)
        combined[: each.step] += float(coefficient) * ends.diff()
    wanted = weights_of(length, 40_000)
    assert (combined - wanted).norm() / wanted.norm() == pytest.approx(distance, rel=1e-3)


def trained(run: RunDir, config: Config, values: torch.Tensor, *, num_ranks: int = 2) -> None:
    """Steps whose master weights are `values`, with the config's checkpoints, all ranks in this process."""
    generation = claim_generation(run)
    states = [StandIn(rank, num_ranks, lengths=config.ema.lengths) for rank in range(num_ranks)]
    writers = [
        Checkpoints(run, config, world, generation=generation, data_fingerprint="data") for world in ranks_of(num_ranks)
    ]
    for state, writer in zip(states, writers, strict=True):
        writer.save(TrainState(), state)  # pyright: ignore[reportArgumentType]
    for step, value in enumerate(values.float()):
        for state, writer in zip(states, writers, strict=True):
            for segment in state.shards.segments:
                part = value[segment.start : segment.start + segment.length]
                state.shards.local("master").copy_(part)
            state.shards.update(ScheduleValues(step, 1.0, target_ema=0.9))
            writer.maybe_save(TrainState(step=step + 1, cursor=8 * step + 8), state)  # pyright: ignore[reportArgumentType]
    for writer in writers:
        writer.wait()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_gives_averages_of_other_lengths_from_its_snapshots(tmp_path: Path, num_ranks: int):
    run, values = RunDir(tmp_path / "run"), walk(STEPS, StandIn(0, 1).shards.num_elements)
    trained(run, flat_config(*AVERAGES, "ema.snapshot_every=10"), values, num_ranks=num_ranks)
    assert [listed.step for listed in list_checkpoints(run.root)] == [STEPS]
    snapshots = list_checkpoints(run.root, within="snapshots")
    assert [listed.step for listed in snapshots] == list(range(10, STEPS + 1, 10))
    assert [problem for listed in snapshots for problem in verify_checkpoint(listed.url)] == []
    assert len(kept_averages(str(run.root), step=STEPS)) == 2 * 40
    for length in (0.03, 0.05, 0.07, 0.15, 0.25):
        for step in (200, STEPS):
            profile = weights_of(length, step)
            wanted = profile @ values[:step]
            found = reconstructed(str(run.root), length, step=step).double()
            error, distance = (
                (found - wanted).norm(),
                error_of(kept_averages(str(run.root), step=step), length, step=step),
            )
            # Cauchy-Schwarz; a constant has no error, as the coefficients have the sum 1
            assert error < 1.05 * distance * profile.norm() * (values[:step] - wanted).norm() + 1e-5, (length, step)
            assert error < 0.03 * (values[step - 1] - wanted).norm(), (length, step)


def test_lengths_that_the_kept_averages_do_not_give_are_refused(tmp_path: Path):
    run, values = RunDir(tmp_path / "run"), walk(40, StandIn(0, 1).shards.num_elements)
    with pytest.raises(UserError, match=r"keeps no averages by a power function; train with ema\.lengths"):
        reconstructed(str(run.root), 0.05, step=10)
    trained(run, flat_config(*AVERAGES), values)
    assert not run.snapshots.exists()
    with pytest.raises(UserError, match=r"power_0\.01: the averages that .* keeps, of 1 steps, give it with an error"):
        reconstructed(str(run.root), 0.01, step=40)
    with pytest.raises(UserError, match=r"power_0\.3: the length must be between 0\.005 and 0\.28"):
        reconstructed(str(run.root), 0.3, step=40)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ema.snapshot_every=10"], "snapshots hold the averages of `lengths`, of which there are none"),
        (["ema.lengths=[0.1]", "ema.snapshot_every=15"], "15 is not a multiple of checkpoint.every_steps, 10"),
        (["ema.lengths=[0.1,0.10000000001]"], "holds two that are equal"),
        (["ema.lengths=[0.3]"], "less than or equal to 0.28"),
    ],
)
def test_configs_without_meaning_are_refused(overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        flat_config(*overrides)
