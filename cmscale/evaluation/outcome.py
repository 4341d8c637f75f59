"""Makes the document of an evaluation from what was measured, writes it, and prints it with its warnings."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.evaluation.measure import caveats, left_out, sizes_of
from cmscale.evaluation.metrics.registry import all_metrics, result_keys
from cmscale.evaluation.progress import Progress, existing
from cmscale.evaluation.session import EvaluationSession, machine_protocol
from cmscale.io.storage import open_parent
from cmscale.runs.results import EvaluationResult, combine, utc_now


def make_result(
    session: EvaluationSession,
    measured: Sequence[Mapping[str, float]],
    *,
    num_samples: int,
    key: str,
    seconds: float,
    protocol: Mapping[str, Any],
    comparison: Sequence[str],
    **sampling: Any,
) -> EvaluationResult:
    """The document of an evaluation. Rank 0 only.

    Args:
        measured: All metrics of each set of samples; the sets' seeds are 0, 1, ...
        comparison: How samples and reference differ, one line each.
        sampling: What else the document holds: `step`, `weights`, `nfe`, `times`, `samples`.
    """
    reference = session.reference
    assert reference is not None, "rank 0 has the reference"
    metrics, sizes = combine(measured), sizes_of(num_samples=num_samples, reference=reference)
    present = [metric for metric in all_metrics() if metric.name in metrics]
    score_name = session.extractor.distance_name
    return EvaluationResult(
        num_samples=num_samples,
        seeds=tuple(range(len(measured))),
        features=session.extractor.label,
        score_name=score_name,
        reference=reference.describe(),
        seconds=round(seconds, 3),
        protocol={**protocol, **session.features_protocol(), **machine_protocol(session.world)},
        warnings=(*comparison, *reference.notes, *caveats(metrics, sizes), *left_out(metrics, reference=reference)),
        metrics=metrics,
        not_measured=tuple(name for name in result_keys() if name not in metrics),
        names={metric.name: metric.title_over(score_name) for metric in present},
        settings={metric.name: dict(found) for metric in present if (found := metric.settings(sizes))},
        date=utc_now(),
        key=key,
        **sampling,
    )


def write_result(result: EvaluationResult, out: str | Path) -> None:
    """Writes a result to a path or URL."""
    storage, name = open_parent(out)
    storage.write(name, result.to_bytes())


def print_result(result: EvaluationResult, *, title: str = "") -> None:
    """Prints the result in a line, and its warnings on stderr."""
    print(f"{title}: {summary(result)}" if title else summary(result), flush=True)
    for line in result.warnings:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def summary(result: EvaluationResult) -> str:
    """The result in one line."""
    parts = [
        f"{metric.title_in(result)} {measured.mean:{metric.format}}"
        for metric in all_metrics()
        if (measured := result.metrics.get(metric.name)) is not None
    ]
    nfe = "" if result.nfe is None else f", NFE {result.nfe}"
    return f"{', '.join(parts)} ({result.num_samples} samples{nfe})"


def known_result(
    out: str | Path,
    *,
    key: str,
    progress: Progress,
    title: str = "",
    lacks: Callable[[EvaluationResult], bool] = lambda _: False,
) -> EvaluationResult | None:
    """The result at `out`, if it is a measurement of the same that counts for the request; it is printed.

    Args:
        lacks: Whether it lacks something that is asked for, so that it is measured anew.

    Raises:
        UserError: another result or something else is there, and the request is not to replace it.
    """
    found = existing(EvaluationResult, out)
    if found is None or (found.key == key and (lacks(found) or not progress.counts(key))):
        return None
    if found.key != key:
        if progress.is_anew:
            return None
        raise UserError(f"{out}: holds another evaluation; give another --out, or --force to replace it")
    print_result(found, title=title)
    print(f"{out}: measured {found.date} already; --force measures anew", file=sys.stderr, flush=True)
    return found
