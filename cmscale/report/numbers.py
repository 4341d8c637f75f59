"""Computes the numbers at the head of the page: progress, time and cost, speed, memory, scores."""

import contextlib
import statistics
from dataclasses import dataclass

from cmscale.evaluation.metrics.frechet import FID
from cmscale.io.counting import in_words
from cmscale.report.facts import RunFacts
from cmscale.report.happened import Stretch, as_number, stretches
from cmscale.runs.comparison import best_by_score, describe_basis
from cmscale.runs.log import is_beside_training


@dataclass(frozen=True)
class Tile:
    """A number with its name and a remark."""

    name: str
    value: str
    remark: str = ""


def tiles(facts: RunFacts, *, state: str) -> list[Tile]:
    """The tiles of a run; what is not known has none."""
    found = [Tile("steps", f"{facts.step:,}", f"of {facts.total_steps:,}" if facts.total_steps else "")]
    measured = facts.measured
    samples, loss = measured.of("samples"), measured.of("loss")
    if len(samples):
        batch = facts.setting("train.global_batch_size", "?")
        seen = int(samples.values[-1])
        shown = f"{seen:,}" if seen < 10**8 else f"{seen / 10**6:,.1f} M"
        found.append(Tile("images seen", shown, f"batch {batch}"))
    if len(loss):
        recent = statistics.fmean(loss.values[-10:].tolist())
        found.append(Tile("loss", f"{recent:.4g}", f"from {loss.values[0]:.4g}"))
    rate = measured.of("images_per_second")
    if (median := rate.recent(len(rate) or 1)) is not None:
        found.append(Tile("images per second", _plain(median), "median"))
    found += _time(facts, state=state)
    if (memory := measured.of("peak_memory_gib")) and len(memory):
        found.append(Tile("peak memory", f"{memory.values.max():.3g} GiB", "of rank 0"))
    if (mfu := measured.of("mfu").recent()) is not None:
        found.append(Tile("MFU", f"{mfu:.1%}", "share of the peak rate, lately"))
    return found + _scores(facts)


def _time(facts: RunFacts, *, state: str) -> list[Tile]:
    """Wall time, time left, and GPU-hours."""
    found = []
    work = stretches(facts.events, last_sign=last_sign(facts))
    if seconds := sum(each.seconds for each in work):
        starts = f"in {len(work):,} starts" if len(work) > 1 else "in one start"
        found.append(Tile("time at work", in_words(seconds), starts))
    left, rate = facts.total_steps - facts.step, facts.measured.of("images_per_second").recent()
    batch = facts.setting("train.global_batch_size")
    if state == "running" and left > 0 and rate and isinstance(batch, int):
        found.append(Tile("time left", in_words(left * batch / rate), "at the rate of the last records"))
    name = "device-hours" if _is_on_cpu(facts) else "GPU-hours"
    if (hours := device_hours(facts, work)) is not None:
        found.append(Tile(name, _plain(hours), "time at work × ranks"))
    return found


def device_hours(facts: RunFacts, work: list[Stretch]) -> float | None:
    """Hours of all devices; None if it is not known how many there were."""
    nodes, per_node = (facts.placement.get(name) for name in ("nodes", "gpus_per_node"))
    ranks = nodes * per_node if isinstance(nodes, int) and isinstance(per_node, int) else None
    hours = 0.0
    for each in work:
        if (count := each.ranks or ranks) is None:
            return None
        hours += each.seconds * count / 3600
    return hours if work else None


def _plain(value: float) -> str:
    """A quantity with at least three digits and no exponent: 0.0123, 12.3, 103,812."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _is_on_cpu(facts: RunFacts) -> bool:
    return facts.setting("engine.device") == "cpu" or any(
        " on cpu" in str(event.get("attention", "")) for event in facts.events[:50]
    )


def last_sign(facts: RunFacts) -> float | None:
    """When the run took the last step that it recorded; None if no event says when an earlier one was.

    Records state how long their steps took, events when they were. The age of the file alone would count the time until
    a run was copied; it is never earlier than the last record, and so bounds what was recorded twice after a fault.
    """
    last = next((each for each in reversed(facts.events) if not is_beside_training(str(each.get("event", "")))), {})
    moment, step = as_number(last.get("time")), last.get("step")
    if moment is None or type(step) is not int:
        return None
    seconds, before = 0.0, 0
    for at, took in facts.measured.of("seconds").points():
        if at > step:
            seconds += took * (at - max(before, step)) / (at - before)
        before = at
    with contextlib.suppress(OSError):
        return min(moment + seconds, facts.run.metrics.stat().st_mtime)
    return moment


def _scores(facts: RunFacts) -> list[Tile]:
    found = []
    for best in best_by_score(facts.evaluations):
        value, _ = FID.formatted(best.fid)
        how = f", {best.nfe} NFE" if best.nfe else ""
        remark = f"step {best.step:,}, {describe_basis(best)}" if best.step is not None else ""
        found.append(Tile(f"best {best.score_name}{how}", value, remark))
    return found
