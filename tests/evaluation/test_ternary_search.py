"""The search for sampling times finds the best of a unimodal score, in few calls, and never makes one twice."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmscale.evaluation.ternary_search import Indices, minimum, search


def counted(score: Callable) -> tuple[Callable, list]:
    calls: list = []

    def counting(argument):
        assert argument not in calls
        calls.append(argument)
        return score(argument)

    return counting, calls


@given(st.data())
def test_finds_the_minimum_of_any_unimodal_score(data: st.DataObject) -> None:
    high = data.draw(st.integers(1, 400))
    best = data.draw(st.integers(1, high))
    first = data.draw(st.integers(1, high))
    left, right = data.draw(st.floats(0.1, 9)), data.draw(st.floats(0.1, 9))
    score, calls = counted(lambda i: (left if i < best else right) * abs(i - best))
    assert minimum(score, 1, high, first=first) == best
    assert len(calls) <= 40


def test_near_its_start_a_handful_of_calls_suffices() -> None:
    score, calls = counted(lambda i: (i - 19) ** 2)
    assert minimum(score, 1, 38, first=17) == 19
    assert len(calls) <= 9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.data())
def test_with_a_noisy_score_the_best_of_all_tried_is_returned(values: list[float], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values) - 1))
    score, calls = counted(lambda i: values[i])
    found = minimum(score, 0, len(values) - 1, first=first)
    assert first in calls
    assert values[found] == min(values[i] for i in calls)


def test_later_times_are_found_with_the_earlier_fixed() -> None:
    score, calls = counted(lambda indices: sum((i - best) ** 2 for i, best in zip(indices, (0, 17, 30), strict=False)))
    assert search(score, steps=3, last=39, start=(0, 17)) == (0, 17, 30)
    assert calls[0] == (0, 17)
    assert all(indices[:2] == (0, 17) for indices in calls if len(indices) == 3)
    assert all(list(indices) == sorted(set(indices)) and indices[-1] < 39 for indices in calls)


@pytest.mark.parametrize("steps", [2, 3, 9, 39])
def test_every_number_of_steps_that_fits_the_grid_gets_distinct_times(steps: int) -> None:
    found = search(lambda indices: -float(indices[-1]), steps=steps, last=39, start=(0, 17))  # as late as it gets
    assert len(set(found)) == steps
    assert found == (0, *range(40 - steps, 39))


@pytest.mark.parametrize("steps", [1, 40])
def test_more_steps_than_the_grid_has_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="it takes 2 to 39"):
        search(lambda indices: float(len(indices)), steps=steps, last=39)


def test_start_outside_what_earlier_times_leave_is_moved_inside() -> None:
    def score(indices: Indices) -> float:
        return float(sum(indices))

    assert search(score, steps=3, last=4, start=(0, 9, 1)) == (0, 1, 2)
