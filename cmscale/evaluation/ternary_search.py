"""Searches the times of multistep sampling greedily, one after the other, by ternary search.

The objective (in practice an FID) is a callable of the chosen indices of a descending grid 0..last, where index 0 is
the start of sampling. Consistency Models, appendix C: each time is found with those
before it fixed, the score taken for unimodal in it.
"""

from collections.abc import Callable

Indices = tuple[int, ...]
Objective = Callable[[Indices], float]


def search(objective: Objective, *, steps: int, last: int, start: Indices = ()) -> Indices:
    """The indices (0, i, j, ...) of `steps` ascending grid indices that minimise `objective`, found greedily.

    Args:
        objective: a score of 2 to `steps` ascending indices, less is better. Called once for each.
        start: where to look first, (0, i, ...); times beyond its length start midway to the grid's end.

    Raises:
        ValueError: the grid has fewer than `steps` times.
    """
    if not 1 < steps <= last:
        raise ValueError(f"{steps} steps of a grid 0..{last}: it takes 2 to {last}")
    chosen: Indices = (0,)
    for number in range(1, steps):
        low, high = chosen[-1] + 1, last - (steps - number)  # each further time needs an index; `last` is the end
        first = start[number] if number < len(start) else (low + high) // 2
        chosen = (*chosen, minimum(_one_more(objective, chosen), low, high, first=min(max(first, low), high)))
    return chosen


def most_trials(*, steps: int, last: int, start: Indices = ()) -> int:
    """How many scores `search` asks for at most, if the score is unimodal in each time."""
    total = 0
    for number in range(1, steps):
        low, high = number, last - (steps - number)
        first = start[number] if number < len(start) else (low + high) // 2
        total += max(_trials_until(best, low, high, min(max(first, low), high)) for best in range(low, high + 1))
    return total


def _trials_until(best: int, low: int, high: int, first: int) -> int:
    tried = set[int]()

    def score(index: int) -> float:
        tried.add(index)
        return abs(index - best)

    minimum(score, low, high, first=first)
    return len(tried)


def minimum(score: Callable[[int], float], low: int, high: int, *, first: int) -> int:
    """The integer in [low, high] where a unimodal score is least: from `first`, strides double until the score
    rises on both sides; what lies between is thirded. Of all that were tried the best is returned, so that noise
    in the score never makes the result worse than the start.
    """
    tried: dict[int, float] = {}

    def at(index: int) -> float:
        if index not in tried:
            tried[index] = score(index)
        return tried[index]

    at(first)
    a, b = _bracket(at, low, high, first)
    while b - a > 2:
        third = max(1, (b - a) // 3)
        left, right = a + third, b - third
        if at(left) <= at(right):
            b = right
        else:
            a = left
    for index in range(a, b + 1):
        at(index)
    return min(tried, key=lambda index: (tried[index], index))


def _bracket(at: Callable[[int], float], low: int, high: int, first: int) -> tuple[int, int]:
    """Indices a <= b around the minimum nearest to `first`."""
    ends = []
    for direction, limit in ((-1, low), (1, high)):
        here, stride = first, 1
        while here != limit:
            there = here + direction * min(stride, abs(limit - here))
            if at(there) > at(here):
                ends.append(there)
                break
            here, stride = there, 2 * stride
        else:
            ends.append(limit)
    return ends[0], ends[1]


def _one_more(objective: Objective, chosen: Indices) -> Callable[[int], float]:
    return lambda index: objective((*chosen, index))
