"""Draws the rooms of the code and the imports between them as ops/architecture.svg, and prints their numbers.

    python ops/architecture.py            draws the picture anew
    python ops/architecture.py --check    exits with 1 if the picture is not that of the code

A room is a package of cmscale, launchers or data_prep, or a module that stands beside such packages. Rooms are drawn in
layers: each imports only from rooms below it. `lint-imports` enforces the layers of pyproject.toml; this picture shows
what is there.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

CHECKOUT = Path(__file__).resolve().parents[1]
PICTURE = CHECKOUT / "ops" / "architecture.svg"
ROOTS = ("cmscale", "launchers", "data_prep")
ROW, BOX_HEIGHT, GAP, CHARACTER = 86, 34, 16, 7.6
COLOURS = {"cmscale": "#2f6fdb", "launchers": "#d9722b", "data_prep": "#2a9d76"}


def read_rooms() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """The rooms with their numbers of modules, and the arrows (importer, imported) with their numbers of imports."""
    sys.path.insert(0, str(CHECKOUT))
    graph = grimp.build_graph(*ROOTS, cache_dir=None)
    rooms: dict[str, int] = defaultdict(int)
    arrows: dict[tuple[str, str], int] = defaultdict(int)
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
    """`cmscale.engine` for `cmscale.engine.shards`; None for the root packages themselves."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 else None


def layers_of(rooms: dict[str, int], arrows: dict[tuple[str, str], int]) -> list[list[str]]:
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


def draw(rooms: dict[str, int], arrows: dict[tuple[str, str], int]) -> str:
    """The picture as SVG text: the same code gives the same bytes."""
    layers = layers_of(rooms, arrows)
    height = ROW * len(layers) + 60
    widths = {room: CHARACTER * len(f"{room} {count}") + 18 for room, count in rooms.items()}
    picture_width = 2 * GAP + max(sum(widths[room] + GAP for room in layer) for layer in layers)
    places: dict[str, tuple[float, float, float]] = {}
    for number, layer in enumerate(layers):
        left = (picture_width - sum(widths[room] + GAP for room in layer) + GAP) / 2
        top = height - 30 - ROW * (number + 1) + (ROW - BOX_HEIGHT) / 2
        for room in layer:
            places[room] = (left, top, widths[room])
            left += widths[room] + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture_width:.0f} {height}" font-family="sans-serif" '
        f'font-size="13">',
        f"<title>{summary(rooms, arrows)}</title>",
        f'<rect width="{picture_width:.0f}" height="{height}" fill="#ffffff"/>',
    ]
    for (importer, imported), count in sorted(arrows.items()):
        (x1, y1, w1), (x2, y2, w2) = places[importer], places[imported]
        start, end = (x1 + w1 / 2, y1 + BOX_HEIGHT), (x2 + w2 / 2, y2)
        bend = (end[1] - start[1]) / 2
        lines.append(
            f'<path d="M{start[0]:.0f} {start[1]:.0f} C{start[0]:.0f} {start[1] + bend:.0f} {end[0]:.0f} '
            f'{end[1] - bend:.0f} {end[0]:.0f} {end[1]:.0f}" fill="none" stroke="{COLOURS[importer.split(".")[0]]}" '
            f'stroke-opacity="0.28" stroke-width="{1 + min(count, 12) / 6:.2f}"/>'
        )
    for room, (left, top, width) in sorted(places.items()):
        colour = COLOURS[room.split(".")[0]]
        lines.append(
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="5" fill="#ffffff" '
            f'stroke="{colour}" stroke-width="1.5"/>'
        )
        lines.append(
            f'<text x="{left + width / 2:.0f}" y="{top + 22:.0f}" text-anchor="middle">{escape(room)} '
            f'<tspan fill="#777777">{rooms[room]}</tspan></text>'
        )
    lines.append(
        f'<text x="{picture_width - 16:.0f}" y="{height - 14}" text-anchor="end" fill="#555555">'
        f"{summary(rooms, arrows)}; grey: modules of a room</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


def summary(rooms: dict[str, int], arrows: dict[tuple[str, str], int]) -> str:
    """The numbers in a line."""
    return f"{len(rooms)} rooms, {len(arrows)} arrows, no circle, {sum(rooms.values())} modules"


def main() -> int:
    """The command. Returns 1 where `--check` finds another picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the picture with the code")
    flags = parser.parse_args()
    rooms, arrows = read_rooms()
    picture = draw(rooms, arrows)
    print(summary(rooms, arrows))
    if flags.check:
        if PICTURE.read_text() != picture:
            print(f"{PICTURE}: not the picture of this code; run python ops/architecture.py", file=sys.stderr)
            return 1
        return 0
    PICTURE.write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
