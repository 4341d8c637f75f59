"""The picture of the architecture is that of the code, and the code has no circle of rooms."""

import re
import subprocess
import sys
from pathlib import Path

import architecture
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_picture_is_up_to_date() -> None:
    command = [sys.executable, str(CHECKOUT / "ops" / "architecture.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match="circle among a, b"):
        architecture.layers_of({"a": 1, "b": 1, "c": 1}, {("a", "b"): 1, ("b", "a"): 1, ("a", "c"): 1})


def test_rooms_lie_above_all_that_they_import() -> None:
    rooms, arrows = architecture.read_rooms()
    height = {room: number for number, layer in enumerate(architecture.layers_of(rooms, arrows)) for room in layer}
    assert all(height[importer] > height[imported] for importer, imported in arrows)
    assert {"cmscale.cli", "cmscale.engine", "launchers.clusters", "data_prep.making"} <= rooms.keys()


def test_every_room_of_cmscale_is_described() -> None:
    described = re.findall(r"^\| `(cmscale\.\w+)`", (CHECKOUT / "ops" / "architecture.md").read_text(), re.MULTILINE)
    assert set(described) == {room for room in architecture.read_rooms()[0] if room.startswith("cmscale.")}


def test_arrows_that_a_chain_implies_are_pale() -> None:
    arrows = {("a", "b"): 1, ("b", "c"): 1, ("a", "c"): 1, ("c", "d"): 1, ("a", "d"): 1}
    assert architecture.implied(arrows) == {("a", "c"), ("a", "d")}
    picture = architecture.draw(
        {"cmscale.a": 1, "cmscale.b": 2, "launchers.c": 1, "data_prep.d": 1},
        {("cmscale.a", "cmscale.b"): 1, ("launchers.c", "cmscale.a"): 1, ("launchers.c", "cmscale.b"): 1},
    )
    assert picture.count("marker-end=") == 2
    assert picture.count('stroke-opacity="0.10"') == 1
