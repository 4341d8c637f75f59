"""Tables of the command line, and the room that they take."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table


def table_of(rows: Sequence[Sequence[str]]) -> Table:
    """A table of rows, the first of which is its head."""
    table = Table(*rows[0], box=None)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def width_of(rows: Sequence[Sequence[str]]) -> int:
    """The columns of a terminal that a table takes."""
    return sum(max(map(cell_len, column)) + 2 for column in zip(*rows, strict=True))
