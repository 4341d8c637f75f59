"""The picture of the architecture is that of the code, and the code has no circle of rooms."""

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
