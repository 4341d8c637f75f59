"""What all benchmarks share: interleaved rounds, medians with their spread, ratios, JSON, an earlier JSON beside it.

    parser = harness.parser(__doc__)
    given = harness.parse(parser)
    values = harness.interleaved({"ours": ours, "bare": bare}, rounds=given.rounds)
    rows = [Row("ours", "s", values["ours"], baseline="bare", wanted=0.9), Row("bare", "s", values["bare"])]
    return harness.report(given, rows, facts={...})

Each round measures every row once, every second round in reverse order, so that a drift of the machine meets all rows
alike. A ratio is the median of the rounds' ratios. A change against an earlier JSON counts only beyond both spreads.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cmscale.commands.ending import guarded
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED
from cmscale.errors import UserError

Action = Callable[[], float]
"""Does the work once and returns what was measured."""


@dataclass(frozen=True)
class Row:
    """A quantity, measured once per round.

    Attributes:
        unit: `s` and sizes are better when they are low, rates (`images/s`) when they are high.
        baseline: The row that it is compared with. The ratio says how good it is: above 1 is better than the baseline.
        wanted: The least ratio, or without a baseline the least (of sizes and seconds: the largest) median.
        clock: What the seconds are: `cpu` of this process, which other load does not change, or `wall`.
    """

    name: str
    unit: str
    values: Sequence[float]
    baseline: str | None = None
    wanted: float | None = None
    clock: str = ""

    @property
    def is_rate(self) -> bool:
        return self.unit.endswith("/s")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile; with fewer than four rounds the extremes."""
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def parser(description: str | None, *, rounds: int = 5) -> CommandParser:
    """A parser with the options of every benchmark."""
    found = CommandParser(prog=Path(sys.argv[0]).name, description=description)
    about = f"number of rounds (default: {rounds})"
    found.add("--rounds", use=USED, type=whole_number(1), default=rounds, help=about)
    found.add("--json", use=USED, type=Path, metavar="FILE", help="also write the results to a JSON file")
    found.add("--against", use=USED, type=Path, metavar="FILE", help="an earlier JSON to compare with")
    return found


def add_config(parser: CommandParser, *, default: str) -> None:
    """Adds what a benchmark of a config takes; `default` says what it measures without one.

    `parse` sets `config` to a file or None, and `overrides` to a list.
    """
    parser.add("config", use=USED, nargs="?", type=Path, help=f"a config file (default: {default})")
    parser.add("overrides", use=USED, nargs="*", metavar="key=value")
    parser.add("--device", use=USED, choices=("auto", "cpu", "cuda"), default="auto")


def parse(parser: CommandParser) -> argparse.Namespace:
    """The command line. A file to compare with is read before any work.

    Raises:
        UserError: a mistake in the command line, or no such file.
    """
    given, _ = parser.read(sys.argv[1:])
    if getattr(given, "config", None) is not None and "=" in str(given.config):  # the first override, without a file
        given.config, given.overrides = None, [str(given.config), *given.overrides]
    given.earlier = read_earlier(given.against) if given.against is not None else {}
    return given


def run(main: Callable[[], int]) -> int:
    """Runs a benchmark as commands run: one line for a user's mistake."""
    return guarded(lambda _: main(), [])


def interleaved(actions: Mapping[str, Action], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """What each action measured in each round; the first `warm_up` rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(-warm_up, rounds):
        names = list(actions) if number % 2 == 0 else list(actions)[::-1]
        for name in names:
            value = actions[name]()
            if number >= 0:
                found[name].append(value)
                print(f"round {number + 1}/{rounds}  {name}: {value:.4g}", file=sys.stderr, flush=True)
    return found


def seconds(action: Callable[[], object], clock: Callable[[], float]) -> Action:
    """An action that measures another's seconds."""

    def measured() -> float:
        began = clock()
        action()
        return clock() - began

    return measured


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU seconds of this process, which other load does not change; on CUDA elapsed ones, once the device is idle."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def ratio(row: Row, base: Row) -> float:
    """How good a row is against its baseline: the median over the rounds; above 1 is better."""
    pairs = zip(row.values, base.values, strict=True)
    return statistics.median(a / b if row.is_rate else b / a for a, b in pairs)


def report(given: argparse.Namespace, rows: Sequence[Row], *, facts: Mapping[str, Any], load: float) -> int:
    """Prints the table, and writes the JSON. Returns 0.

    Args:
        facts: What was measured, and where: written as it is.
        load: The machine's load before the first round (`os.getloadavg()[0]`).
    """
    results = [summary(row, rows) for row in rows]
    earlier = getattr(given, "earlier", {})
    table = Table("", "median", "spread", "unit", "baseline", "ratio", "wanted", box=None)
    if earlier:
        table.add_column("earlier")
        table.add_column("change")
    for result in results:
        low, high = result["spread"]
        cells = [result["name"], _number(result["median"]), f"{_number(low)} to {_number(high)}"]
        cells += [f"{result['unit']} {result['clock']}".strip(), result["baseline"] or ""]
        cells += ["" if result["ratio"] is None else f"{result['ratio']:.3f}", _wanted(result)]
        if earlier:
            cells += change(result, earlier.get(result["name"]))
        table.add_row(*cells)
    console = Console()
    (console if console.is_terminal else Console(width=170)).print(table)
    machine = {**machine_facts(), "load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    described = {**facts, **machine}
    print("  ".join(f"{name} {value}" for name, value in described.items() if not isinstance(value, dict | list)))
    if given.json is not None:
        document = {"rows": results, "facts": dict(facts), "machine": machine, "rounds": given.rounds}
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def summary(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row as it is written."""
    bases = {each.name: each for each in rows}
    found = None if row.baseline is None else round(ratio(row, bases[row.baseline]), 4)
    reached = None
    if row.wanted is not None:
        measured = row.median if found is None else found
        reached = measured >= row.wanted if found is not None or row.is_rate else measured <= row.wanted
    return {
        "name": row.name,
        "unit": row.unit,
        "clock": row.clock,
        "median": row.median,
        "spread": list(row.spread),
        "values": list(row.values),
        "baseline": row.baseline,
        "ratio": found,
        "wanted": row.wanted,
        "reached": reached,
    }


def change(result: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """The earlier median, and by how much it changed: with `faster` or `slower` where the spreads are apart."""
    if before is None:
        return ["", "new"]
    relative = result["median"] / before["median"] - 1 if before["median"] else 0.0
    apart = result["spread"][0] > before["spread"][1] or result["spread"][1] < before["spread"][0]
    if not apart:
        return [_number(before["median"]), f"{relative:+.1%} within the spread"]
    better = (relative > 0) == result["unit"].endswith("/s")
    return [_number(before["median"]), f"{relative:+.1%} {'better' if better else 'WORSE'}"]


def read_earlier(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier JSON by name.

    Raises:
        UserError: there is no such file, or it is no result of a benchmark.
    """
    try:
        return {row["name"]: row for row in json.loads(path.read_text())["rows"] if row["median"] is not None}
    except FileNotFoundError:
        raise UserError(f"--against {path}: no such file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--against {path}: is not what --json of a benchmark wrote") from None


def machine_facts() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Computes with `count` threads on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _wanted(result: Mapping[str, Any]) -> str:
    if result["wanted"] is None:
        return ""
    sign = ">=" if result["baseline"] or result["unit"].endswith("/s") else "<="
    return f"{sign} {result['wanted']:g} {'' if result['reached'] else 'MISSED'}".strip()
