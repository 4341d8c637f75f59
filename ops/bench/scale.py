"""Measures what starting, saving, committing, restoring and ordering cost as ranks grow, without as many machines.

    python ops/bench/scale.py [--ranks 2,16,128,1024,4096] [--zero-stage 2] [--gloo 2,8,32] [--rounds 5]
                              [--json FILE] [--against FILE]

One process plays one rank of many: rank 0, or where all ranks do the same, any. Files are real; what other ranks
write is written beforehand. Seconds are processor time, so that other processes on the machine do not count, and
operations are those of the file system: a parallel one takes about a millisecond for each. With --gloo, ranks are real:
forks of this process train a tiny network once, seconds are wall time, and more ranks than processors wait for each
other.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import gloo_ranks
import harness
from harness import Row
from rich.console import Console
from rich.table import Table
from simulated_ranks import Operations, SimulatedRanks

from cmscale.commands.use import USED


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add("--ranks", use=USED, type=numbers, default=(2, 16, 128, 1024, 4096), help="numbers of simulated ranks")
    parser.add("--zero-stage", use=USED, type=int, choices=(0, 1, 2, 3), default=2)
    parser.add("--gloo", use=USED, type=numbers, default=(), help="numbers of real ranks; none by default")
    given = harness.parse(parser)
    load, operations = os.getloadavg()[0], Operations()
    rows: list[Row] = []
    with harness.threads(1):
        for ranks in given.ranks:
            rows += simulated(ranks, given.zero_stage, operations, rounds=given.rounds)
        if given.gloo:
            rows += real(given.gloo)
    facts = {"zero_stage": given.zero_stage, "ranks": list(given.ranks), "gloo": list(given.gloo)}
    status = harness.report(given, rows, facts=facts, load=load)
    by_ranks(rows)
    return status


def numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of ranks, such as 2,16,128")
    return found


def simulated(ranks: int, stage: int, operations: Operations, *, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        simulation = SimulatedRanks(Path(folder), ranks, stage, operations)
        return simulation.rows(harness.interleaved(simulation.actions(), rounds=rounds))


def real(counts: Sequence[int]) -> list[Row]:
    """What starting, saving and resuming take on real ranks."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        data = gloo_ranks.make_data(Path(folder))
        found = {ranks: gloo_ranks.measure(Path(folder) / str(ranks), data, ranks) for ranks in counts}
    return [
        Row(f"{ranks}: gloo, {name}", "s", [seconds], clock="wall")
        for ranks, values in found.items()
        for name, seconds in values.items()
    ]


def by_ranks(rows: Sequence[Row]) -> None:
    """Prints the medians once more: a line for each quantity, a column for each number of ranks."""
    medians: dict[str, dict[int, float]] = {}
    for row in rows:
        ranks, _, name = row.name.partition(": ")
        medians.setdefault(name, {})[int(ranks)] = row.median
    columns = sorted({ranks for values in medians.values() for ranks in values})
    table = Table("by number of ranks", *(f"{ranks:,}" for ranks in columns), box=None)
    for name, values in medians.items():
        table.add_row(name, *(f"{values[ranks]:,.4g}" if ranks in values else "" for ranks in columns))
    Console(width=170).print(table)


if __name__ == "__main__":
    sys.exit(harness.run(main))
