"""Prints the oldest version of every package that pyproject.toml admits, as requirements: `torch==2.9.0`."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest(dependencies: list[str]) -> list[str]:
    """`name==lower bound` of each dependency.

    Raises:
        ValueError: one has no lower bound.
    """
    found = []
    for dependency in dependencies:
        match = re.match(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9][^,;\s]*)", dependency)
        if match is None:
            raise ValueError(f"{dependency}: has no lower bound")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    print("\n".join(oldest(tomllib.loads(PROJECT.read_text())["project"]["dependencies"])))
