"""Prints what the demo learned, and fails where it did not."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

# How much of the starting FD-EfficientNet may be left: teacher, CD, CT.
PROMISES = {"short": {"edm": 1 / 3, "cd": 0.7, "ct": 0.7}, "long": {"edm": 0.4, "cd": 0.4, "ct": 0.4}}


def main(runs: Path, length: str) -> int:
    """Reads the runs' evaluations; exit status 1 where one kept less than it promised."""
    table = Table("run", "NFE", "at the start", "at the end", "left", "promised", box=None)
    broken = 0
    untrained = None
    for kind, promise in PROMISES[length].items():
        files = sorted((runs / kind / "evaluations").glob("step-*.json"))
        results = [json.loads(path.read_text()) for path in files]
        first, last = results[0], results[-1]
        start = first["fid"]["mean"]
        # CD starts from the teacher's weights; what it is held against is the untrained network, as CT's start.
        untrained = start if kind == "edm" else untrained
        base = min(start, untrained) if kind == "cd" and untrained else start
        left = last["fid"]["mean"] / base
        broken += left > promise
        numbers = [f"{value['fid']['mean']:.1f}" for value in (first, last)]
        table.add_row(kind, str(last["nfe"]), *numbers, f"{left:.2f}", f"{promise:.2f}")
    Console(width=100).print(table)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
