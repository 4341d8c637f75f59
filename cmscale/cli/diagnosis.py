"""Shows what `cmscale doctor` finds, on this machine or on the nodes of a Slurm job."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from cmscale.cli.command import TableConsole
from cmscale.cli.finding import Finding
from cmscale.cli.json_output import print_json
from cmscale.cli.machine import findings
from cmscale.cli.nodes import differing, doctor_of_nodes, report_node, shared, unmeasured
from cmscale.cli.services import storage
from cmscale.io.place import Place

_NAMED = 4  # nodes in a row
__all__ = ["found_here", "report_node", "shared", "show", "show_nodes"]


def found_here(place: Place | None, runs_dir: Path, *, is_of_many: bool = False) -> list[Finding]:
    """What this machine offers, and whether the storage `place` (by default the site's) works.

    Args:
        is_of_many: Whether it is one of the nodes of a job, which do not show how far they are.
    """
    return [*findings(runs_dir, counts=not is_of_many), *storage(place)]


def show(found: Sequence[Finding], *, as_json: bool) -> bool:
    """Prints findings. Returns whether one is a failure."""
    if as_json:
        print_json([vars(each) for each in found])
    else:
        table = Table("", "what", "found", "what to do", box=None)
        for each in found:
            table.add_row(each.state, each.what, each.found, each.remedy)
        TableConsole().print(table)
    return any(each.state == "failure" for each in found)


def _print_alike(nodes: Mapping[str, Sequence[Finding]], different: Sequence[str]) -> None:
    """Prints a row for each thing, and the nodes on which it was found so."""
    alike: dict[tuple[str, str, str], list[tuple[str, Finding]]] = {}
    for node, found in nodes.items():
        for each in found:
            if each.state != "ok" or each.what in different:
                alike.setdefault((each.what, each.state, unmeasured(each.found, node)), []).append((node, each))
    table = Table("", "nodes", "what", "found", "what to do", box=None)
    for (what, state, _), there in sorted(alike.items(), key=lambda item: item[0][0]):
        names = [node for node, _ in there]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        shown = "all" if len(names) == len(nodes) else ", ".join(names[:_NAMED]) + more
        table.add_row(state, shown, what, there[0][1].found, there[0][1].remedy)
    TableConsole().print(table)


def show_nodes(count: int, place: Place | None, runs_dir: Path, *, as_json: bool) -> bool:
    """Tries nodes; prints what is no `ok` anywhere, and in what nodes differ. Returns whether something fails."""
    nodes = doctor_of_nodes(count, runs_dir=runs_dir.absolute(), place=None if place is None else place.absolute())
    different = differing(nodes)
    if as_json:
        shown = {node: [vars(each) for each in found] for node, found in nodes.items()}
        print_json({"nodes": shown, "differing": different})
    else:
        _print_alike(nodes, different)
        names = ", ".join(different)
        print(f"{len(nodes)} nodes; {f'they differ in: {names}' if different else 'they do not differ'}")
    return any(each.state == "failure" for found in nodes.values() for each in found)
