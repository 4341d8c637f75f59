"""Tests that a small run killed at random moments ends like an uninterrupted one."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "ops" / "soak.py"


@pytest.mark.timeout(600)  # a minute on an idle machine
@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--outages",)])
def test_three_kills_change_no_loss_and_no_weight_and_leave_no_process(tmp_path: Path, more: tuple[str, ...]) -> None:
    command = [sys.executable, str(SOAK), "--kills", "3", "--seed", "3", "--out", str(tmp_path / "soak"), *more]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=560)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "kills: 3 of 3" in ran.stdout
    assert "differences: 0" in ran.stdout
