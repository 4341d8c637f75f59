"""Draws the rooms of the code and the imports between them as ops/architecture.svg, and prints their numbers.

    python ops/architecture.py            draws the picture
    python ops/architecture.py --check    exits with status 1 if the picture differs from the code

A room is a package of cmscale, launchers or data_prep, or a module next to such packages. Rooms are drawn in layers:
each imports only from rooms below it. An arrow means that a room imports another; it is pale if a chain of other arrows
leads there too. `lint-imports` enforces the layers of pyproject.toml; this picture shows what there is.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

CHECKOUT = Path(__file__).resolve().parents[1]
PICTURE = CHECKOUT / "ops" / "architecture.svg"
ROOTS = ("launchers", "cmscale", "data_prep")  # in the order of their columns
ROW, BOX_HEIGHT, GAP, MARGIN, CHARACTER = 96, 34, 16, 24, 7.6
COLOURS = {"cmscale": "#2f6fdb", "launchers": "#d9722b", "data_prep": "#2a9d76"}

Arrow = tuple[str, str]  # (importer, imported)


@dataclass(frozen=True)
class Box:
    """A room's rectangle: its top left corner and its width."""

    left: float
    top: float
    width: float

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def read_rooms() -> tuple[dict[str, int], dict[Arrow, int]]:
    """The rooms with their numbers of modules, and the arrows with their numbers of imports."""
    sys.path.insert(0, str(CHECKOUT))
    graph = grimp.build_graph(*ROOTS, cache_dir=None)
    rooms: dict[str, int] = defaultdict(int)
    arrows: dict[Arrow, int] = defaultdict(int)
    for module in sorted(graph.modules):
        here = room_of(module)
        if here is None:
            continue
        rooms[here] += 1
        for imported in graph.find_modules_directly_imported_by(module):
            there = room_of(imported)
            if there is not None and there != here:
                arrows[here, there] += 1
    return dict(rooms), dict(arrows)


def room_of(module: str) -> str | None:
    """`cmscale.engine` for `cmscale.engine.shards`; None for the root packages themselves and `python -m cmscale`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1] != "__main__" else None


def layers_of(rooms: dict[str, int], arrows: dict[Arrow, int]) -> list[list[str]]:
    """Rooms by height: 0 imports no other room, each other lies one above the highest that it imports.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    below: dict[str, set[str]] = {room: set() for room in rooms}
    for importer, imported in arrows:
        below[importer].add(imported)
    heights: dict[str, int] = {}
    while len(heights) < len(rooms):
        ready = [room for room in rooms if room not in heights and below[room] <= heights.keys()]
        if not ready:
            raise ValueError(f"circle among {', '.join(sorted(rooms.keys() - heights.keys()))}")
        heights |= {room: max((heights[under] + 1 for under in below[room]), default=0) for room in ready}
    return [sorted(room for room in rooms if heights[room] == height) for height in range(max(heights.values()) + 1)]


def implied(arrows: dict[Arrow, int]) -> set[Arrow]:
    """The arrows between rooms that a chain of other arrows connects as well."""
    below: dict[str, set[str]] = defaultdict(set)
    for importer, imported in arrows:
        below[importer].add(imported)

    def reached(room: str) -> set[str]:
        return below[room].union(*map(reached, below[room]))

    return {(a, b) for a, b in arrows if any(b in reached(middle) for middle in below[a])}


def boxes_of(rooms: dict[str, int], layers: list[list[str]]) -> tuple[dict[str, Box], float]:
    """A box per room, and the width of the picture: a column per root, a line per layer, wrapped to its column."""
    widths = {room: CHARACTER * len(f"{room} {count}") + 18 for room, count in rooms.items()}
    boxes: dict[str, Box] = {}
    left = float(MARGIN)
    for root in ROOTS:
        lines = [[room for room in layer if room.startswith(f"{root}.")] for layer in layers]
        column = max(sum(widths[room] + GAP for room in line) for line in lines)
        for height, line in enumerate(lines):
            place = left + (column - sum(widths[room] + GAP for room in line)) / 2
            for room in line:
                boxes[room] = Box(place, MARGIN + ROW * (len(layers) - 1 - height), widths[room])
                place += widths[room] + GAP
        left += column + 2 * GAP
    return boxes, left - 3 * GAP + MARGIN


def arrow_line(importer: str, imported: str, boxes: dict[str, Box], *, pale: bool) -> str:
    """An arrow as SVG: a curve from the lower edge of one box to the upper edge of another."""
    start, end, root = boxes[importer], boxes[imported], importer.partition(".")[0]
    top, bottom = start.top + BOX_HEIGHT, end.top - 7
    bend = min(70.0, (bottom - top) / 2)
    curve = (
        f"M{start.middle:.0f} {top:.0f} C{start.middle:.0f} {top + bend:.0f} "
        f"{end.middle:.0f} {bottom - bend:.0f} {end.middle:.0f} {bottom:.0f}"
    )
    style = 'stroke-opacity="0.10"' if pale else f'stroke-opacity="0.75" marker-end="url(#{root})"'
    return f'<path d="{curve}" fill="none" stroke="{COLOURS[root]}" stroke-width="1.3" {style}/>'


def draw(rooms: dict[str, int], arrows: dict[Arrow, int]) -> str:
    """The picture as SVG text: the same code gives the same bytes."""
    layers = layers_of(rooms, arrows)
    boxes, width = boxes_of(rooms, layers)
    height = 2 * MARGIN + ROW * (len(layers) - 1) + BOX_HEIGHT + 30
    size = f'width="{width:.0f}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" {size} font-family="sans-serif" '
        'font-size="13">',
        f"<title>{summary(rooms, arrows)}</title>",
        *(
            f'<marker id="{root}" orient="auto" markerWidth="7" markerHeight="6" refX="1" refY="3">'
            f'<path d="M0 0 L7 3 L0 6 z" fill="{colour}"/></marker>'
            for root, colour in sorted(COLOURS.items())
        ),
        f'<rect {size} fill="#ffffff"/>',
    ]
    pale = implied(arrows)
    for arrow in sorted(arrows, key=lambda arrow: (arrow not in pale, arrow)):
        lines.append(arrow_line(*arrow, boxes, pale=arrow in pale))
    for room, box in sorted(boxes.items()):
        lines.append(
            f'<rect x="{box.left:.0f}" y="{box.top:.0f}" width="{box.width:.0f}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="#ffffff" stroke="{COLOURS[room.partition(".")[0]]}" stroke-width="1.5"/>'
        )
        lines.append(
            f'<text x="{box.middle:.0f}" y="{box.top + 22:.0f}" text-anchor="middle">{escape(room)} '
            f'<tspan fill="#777777">{rooms[room]}</tspan></text>'
        )
    note = f"{summary(rooms, arrows)}; grey: a room's modules; pale: imports that a chain of arrows implies"
    lines.append(
        f'<text x="{width - MARGIN:.0f}" y="{height - 14}" text-anchor="end" fill="#555555">{escape(note)}</text>'
    )
    return "\n".join([*lines, "</svg>", ""])


def summary(rooms: dict[str, int], arrows: dict[Arrow, int]) -> str:
    """The numbers in one line."""
    return f"{len(rooms)} rooms, {len(arrows)} arrows, no circle, {sum(rooms.values())} modules"


def main() -> int:
    """The command. Returns 1 if `--check` finds another picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the picture with the code")
    flags = parser.parse_args()
    rooms, arrows = read_rooms()
    picture = draw(rooms, arrows)
    print(summary(rooms, arrows))
    for root in ROOTS:
        inside = {room: count for room, count in rooms.items() if room.startswith(f"{root}.")}
        print(f"  {root}: {summary(inside, {arrow: n for arrow, n in arrows.items() if inside.keys() >= {*arrow}})}")
    if not flags.check:
        PICTURE.write_text(picture)
    elif PICTURE.read_text() != picture:
        print(f"{PICTURE}: not the picture of this code; run python ops/architecture.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
