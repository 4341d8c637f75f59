"""The check with the oldest packages takes them from pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import oldest_versions
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    assert oldest_versions.oldest(["torch>=2.9.0", "deepspeed>=0.19.8,<0.20"]) == ["torch==2.9.0", "deepspeed==0.19.8"]
    with pytest.raises(ValueError, match="webdataset: has no lower bound"):
        oldest_versions.oldest(["webdataset"])


def test_every_dependency_has_a_lower_bound() -> None:
    command = [sys.executable, str(CHECKOUT / "ops/oldest_versions.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = [line.split("==")[0] for line in printed]
    assert {"torch", "torchvision", "xformers", "deepspeed", "numpy", "pydantic"} <= set(names)
    assert len(set(names)) == len(names)
