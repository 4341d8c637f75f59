"""Prints what the demo's runs learned, and fails if one of them learned less than expected."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cmscale.runs.comparison import groups_of, once_each
from cmscale.runs.folder import RunDir
from cmscale.runs.results import read_evaluations

EXPECTED = {
    "short": {"edm": (1 / 3, 2), "cd": (0.7, 1), "ct": (0.7, 1)},
    "long": {"edm": (1 / 3, 2), "cd": (0.7, 1), "ct": (0.7, 0)},
}
"""By demo and method: the largest fraction of the initial FD-EfficientNet that may be left at the end, and how many of
`SHARES` must be above zero."""
SHARES = ("recall", "coverage")
"""Of the photographs, those that the final samples reach."""


def main(runs: Path, length: str) -> int:
    """Reads the runs' evaluations. Returns the exit status: 1 if a run's final scores are worse than expected."""
    table = Table("run", "NFE", "at the start", "at the end", "left", "expected", *SHARES, box=None)
    failed = 0
    untrained = None
    for kind, (expected, num_reached) in EXPECTED[length].items():
        results, _ = read_evaluations(RunDir(runs / kind))
        compared = once_each(groups_of(results)[0])
        first, last = compared[0], compared[-1]
        start = first.fid.mean
        # CD starts with the teacher's weights, so it is compared with the untrained network, as CT is.
        untrained = start if kind == "edm" else untrained
        base = min(start, untrained) if kind == "cd" and untrained else start
        left = last.fid.mean / base
        reached = {name: last.metrics[name].mean for name in SHARES}
        failed += left > expected or sum(share > 0 for share in reached.values()) < num_reached
        scores = [f"{result.fid.mean:.1f}" for result in (first, last)]
        shares = [f"{share:.3f}" for share in reached.values()]
        table.add_row(kind, str(last.nfe), *scores, f"{left:.2f}", f"at most {expected:.2f}", *shares)
    Console(width=100).print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
