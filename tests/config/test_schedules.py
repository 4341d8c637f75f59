"""Tests of the schedules: N(k), mu(k), curricula and the learning rate against the formulas of the papers."""

import math
from decimal import ROUND_CEILING, Decimal, localcontext
from fractions import Fraction

import pytest

from cmscale.config import CT, ECT, ICT, MCD, PD, Method, Optimizer, schedules
from cmscale.config.methods import ct, ect, ict, mcd, pd

CASES = [(2, 150, 1_000_000), (2, 200, 800_000), (2, 150, 300), (10, 30, 977), (3, 3, 50)]


def paper_scales(step: int, total: int, s0: int, s1: int) -> int:
    """N(k) by the paper's formula in 60 digits, so that rounding can't change the integer."""
    with localcontext() as context:
        context.prec = 60
        square = Fraction(step, total) * ((s1 + 1) ** 2 - s0**2) + s0**2
        if (root := math.isqrt(math.floor(square))) ** 2 == square:
            return root - 1 + 1
        value = (Decimal(square.numerator) / Decimal(square.denominator)).sqrt() - 1
        return int(value.to_integral_value(rounding=ROUND_CEILING)) + 1


@pytest.mark.parametrize(("s0", "s1", "total"), CASES)
def test_num_scales_is_the_papers_formula_exactly(s0: int, s1: int, total: int):
    steps = range(0, total + 1, max(1, total // 4000))
    assert [ct.ct_num_scales(k, total_steps=total, s0=s0, s1=s1) for k in steps] == [
        paper_scales(k, total, s0, s1) for k in steps
    ]


@pytest.mark.parametrize(("s0", "s1", "total"), CASES)
def test_every_boundary_of_num_scales_lies_where_the_formula_has_it(s0: int, s1: int, total: int):
    # N(k) <= n as long as k ((s1+1)^2 - s0^2) <= K (n^2 - s0^2): the last such k, and the one after.
    for n in range(s0, s1 + 1):
        last = total * (n**2 - s0**2) // ((s1 + 1) ** 2 - s0**2)
        assert ct.ct_num_scales(last, total_steps=total, s0=s0, s1=s1) <= n
        assert ct.ct_num_scales(last + 1, total_steps=total, s0=s0, s1=s1) > n


def test_num_scales_runs_from_s0_to_s1_plus_1_and_stays():
    scales = [ct.ct_num_scales(k, total_steps=300, s0=2, s1=150) for k in range(400)]
    assert scales[0] == 2
    assert scales == sorted(scales)
    assert set(scales[300:]) == {151}


@pytest.mark.parametrize("convention", ["paper", "released_code"])
def test_target_ema_is_exp_of_s0_log_mu0_over_its_divisor(convention):
    with localcontext() as context:
        context.prec = 50
        for scales in range(2, 152):
            divisor = scales if convention == "paper" else scales - 1
            exact = (Decimal(2) * Decimal.from_float(0.95).ln() / divisor).exp()
            given = ct.ct_target_ema(scales, s0=2, mu0=0.95, convention=convention)
            assert abs(Decimal(given) - exact) < Decimal(2) ** -52


@pytest.mark.parametrize("convention", ["paper", "released_code"])
def test_without_an_average_the_target_is_the_student(convention):
    assert [ct.ct_target_ema(n, s0=2, mu0=0.0, convention=convention) for n in (2, 40, 151)] == [0.0] * 3


def test_released_code_starts_with_mu0_squared_and_paper_with_mu0():
    assert ct.ct_target_ema(2, s0=2, mu0=0.95, convention="paper") == pytest.approx(0.95, rel=1e-15)
    assert ct.ct_target_ema(2, s0=2, mu0=0.95, convention="released_code") == pytest.approx(0.95**2, rel=1e-15)


@pytest.mark.parametrize("total", [400_000, 8, 1001, 3])
def test_ict_doubles_the_grid_in_equal_parts_of_training(total: int):
    length = max(total // 8, 1)  # log2 floor(1280 / 10) + 1 = 8
    for step in {0, 1, length - 1, length, 3 * length, 7 * length - 1, 7 * length, total - 1, total}:
        expected = min(10 * 2 ** (step // length), 1280) + 1
        assert ict.ict_num_scales(step, total_steps=total, s0=10, s1=1280) == expected


def test_ict_takes_the_logarithm_of_a_ratio_that_is_no_power_of_two():
    # floor(70 / 10) = 7: K' = floor(1000 / (log2 7 + 1)) = floor(1000 / 3.8073...) = 262
    scales = [ict.ict_num_scales(k, total_steps=1000, s0=10, s1=70) for k in (0, 261, 262, 523, 524, 786, 999)]
    assert scales == [11, 11, 21, 21, 41, 71, 71]


def test_ect_stages_part_training_equally():
    stages = [ect.ect_stage(k, total_steps=800, num_stages=8) for k in range(800)]
    assert stages == [k // 100 for k in range(800)]
    assert ect.ect_stage(5000, total_steps=800, num_stages=8) == 7


@pytest.mark.parametrize("total", [9, 90, 100, 450_000])
def test_pd_halves_its_scales_stage_by_stage_and_stays_twice_as_long_at_2_and_1(total: int):
    scales = [pd.pd_stage(step, total_steps=total, start_scales=64)[0] for step in range(min(total, 2000))]
    if total <= 2000:
        assert sorted(set(scales), reverse=True) == [64, 32, 16, 8, 4, 2, 1]
        assert scales == sorted(scales, reverse=True)
        for found, parts in ((64, 1), (4, 1), (2, 2), (1, 2)):
            assert abs(scales.count(found) - parts * total / 9) < 1
    assert pd.pd_stage(total - 1, total_steps=total, start_scales=64)[0] == 1
    ends = [pd.pd_stage(part * total // 9, total_steps=total, start_scales=64)[0] for part in range(9)]
    assert total % 9 or ends == [64, 32, 16, 8, 4, 2, 2, 1, 1]


def test_pds_teacher_stands_still_within_a_stage_and_becomes_the_student_at_its_end():
    method = PD(kind="pd", teacher="t", start_scales=4)
    scheduled = [schedules.for_method(method, k, learning_rate=1.0, total_steps=10) for k in range(10)]
    assert [values.num_scales for values in scheduled] == [4, 4, 2, 2, 2, 2, 1, 1, 1, 1]
    assert [values.target_ema for values in scheduled] == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert [values.sampling_steps for values in scheduled] == [values.num_scales for values in scheduled]
    assert [values.ends_stage for values in scheduled] == [rate == 0 for rate in (1, 0, 1, 1, 1, 0, 1, 1, 1, 1)]


def test_pds_learning_rate_falls_to_0_in_each_stage():
    method = PD(kind="pd", teacher="t", start_scales=4)
    rates = [schedules.for_method(method, k, learning_rate=1.0, total_steps=10).learning_rate for k in range(10)]
    assert rates == [1, 0.5, 1, 0.75, 0.5, 0.25, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_mcds_teacher_takes_exponentially_more_steps_and_always_whole_ones_in_each_segment(segments: int):
    method = MCD(kind="mcd", teacher="t", segments=segments)  # pyright: ignore[reportArgumentType]
    steps = [mcd.mcd_teacher_steps(method, k) for k in range(0, 120_001, 500)]
    exact = [64 * 20 ** min(k / 100_000, 1) for k in range(0, 120_001, 500)]
    assert all(abs(a - b) <= segments / 2 and a % segments == 0 for a, b in zip(steps, exact, strict=True))
    assert (steps[0], steps[100], steps[200], steps[-1]) == (64, round(64 * 20**0.5 / segments) * segments, 1280, 1280)
    values = schedules.for_method(method, 10**6, learning_rate=1.0, total_steps=10)
    assert (values.num_scales, values.sampling_steps, method.final_num_scales) == (1281, None, 1281)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"segments": 6}, "teacher_steps: 64 steps can't be divided into 6 segments"),
        ({"segments": 3, "teacher_steps": 66}, "final_teacher_steps: 1280 steps can't be divided into 3 segments"),
        ({"teacher_steps": 2560}, "teacher_steps: 2560 must not be above final_teacher_steps, 1280"),
    ],
)
def test_segments_that_do_not_agree_with_the_teachers_steps_are_refused(keys: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MCD(kind="mcd", teacher="t", **keys)


def test_warm_up_is_linear_and_ends_at_the_rate():
    optimizer = Optimizer(learning_rate=1e-3, warmup_steps=4)
    rates = [schedules.learning_rate(optimizer, step) for step in range(6)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3], rel=1e-15)
    assert schedules.learning_rate(Optimizer(learning_rate=1e-3), 0) == 1e-3


def test_each_method_gets_what_its_loss_reads():
    given = {"learning_rate": 1e-4, "total_steps": 100}
    values = schedules.for_method(CT(kind="ct"), 50, **given)
    assert (values.num_scales, values.target_ema) == (107, math.exp(2 * math.log(0.95) / 107))
    values = schedules.for_method(ICT(kind="ict"), 50, **given)
    assert (values.num_scales, values.target_ema) == (161, None)
    values = schedules.for_method(ECT(kind="ect", teacher="t"), 50, **given)
    assert (values.num_scales, values.stage) == (None, 4)


@pytest.mark.parametrize(
    "method",
    [
        CT(kind="ct", schedule_steps=40),
        ICT(kind="ict", schedule_steps=40),
        ECT(kind="ect", teacher="t", schedule_steps=40),
        PD(kind="pd", teacher="t", start_scales=4, schedule_steps=40),
    ],
)
def test_a_schedule_of_its_own_length_does_not_depend_on_the_runs_and_stays_at_its_end(method: Method):
    alone = method.model_copy(update={"schedule_steps": None})
    found = [schedules.for_method(method, step, learning_rate=1.0, total_steps=100) for step in range(60)]
    assert found == [schedules.for_method(alone, step, learning_rate=1.0, total_steps=40) for step in range(60)]
    last = {(values.num_scales, values.stage, values.ends_stage) for values in found[40:]}
    assert len(last) == 1


@pytest.mark.parametrize("kind", ["ct", "ict"])
def test_a_grid_that_would_shrink_is_refused(kind: str):
    with pytest.raises(ValueError, match="s0: 20 must not be above s1, 10"):
        (CT if kind == "ct" else ICT)(kind=kind, s0=20, s1=10)


@pytest.mark.parametrize(
    ("every", "last", "due"), [(3, 8, [3, 6, 8]), (4, 8, [4, 8]), (1, 3, [1, 2, 3]), (9, 8, [8]), (0, 8, [])]
)
def test_what_is_done_every_so_many_steps_is_done_after_the_last_too(every: int, last: int, due: list[int]):
    assert [step for step in range(1, last + 1) if schedules.is_due(step, every, last)] == due


def rates(total: int, **keys: object) -> list[float]:
    optimizer = Optimizer(learning_rate=2.0, **keys)  # pyright: ignore[reportArgumentType]
    return [schedules.learning_rate(optimizer, step, total_steps=total) for step in range(total)]


def test_the_inverse_square_root_is_constant_up_to_its_reference():
    found = rates(400, schedule="inverse_square_root", decay_reference=25)
    assert found == [2.0 / max(k / 25, 1) ** 0.5 for k in range(400)]
    assert (found[25], found[100]) == (2.0, 1.0)


def test_the_cosine_falls_from_the_rate_to_0_over_the_run():
    found = rates(100, schedule="cosine")
    assert found == pytest.approx([1 + math.cos(math.pi * k / 100) for k in range(100)], rel=1e-15)


def test_a_cosine_of_its_own_length_ends_there_and_stays():
    found = rates(100, schedule="cosine", decay_reference=50)
    assert found[:50] == rates(50, schedule="cosine")
    assert found[50:] == [0.0] * 50


def test_steps_multiply_the_rate_at_each_listed_step():
    found = rates(40, schedule="step", decay_steps=[10, 30], decay_factor=0.1)
    assert found == pytest.approx([2.0] * 10 + [0.2] * 20 + [0.02] * 10, rel=1e-15)


def test_a_decay_comes_on_top_of_the_warm_up():
    found = rates(8, schedule="inverse_square_root", decay_reference=2, warmup_steps=4)
    assert found == pytest.approx([2.0 * min((k + 1) / 4, 1) / max(k / 2, 1) ** 0.5 for k in range(8)], rel=1e-15)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "inverse_square_root"}, "decay_reference: is not set"),
        ({"schedule": "step", "decay_steps": [5]}, "decay_factor: is not set"),
        ({"schedule": "step", "decay_factor": 0.5}, "decay_steps: is not set"),
        ({"decay_reference": 5}, "decay_reference: schedule constant does not use it"),
        ({"schedule": "cosine", "decay_factor": 0.5}, "decay_factor: schedule cosine does not use it"),
        ({"schedule": "step", "decay_steps": [9, 5], "decay_factor": 0.5}, r"decay_steps: \[9, 5\] must ascend"),
    ],
)
def test_keys_that_a_schedule_needs_or_does_not_use_are_named(keys: dict, message: str):
    with pytest.raises(ValueError, match=message):
        rates(10, **keys)
