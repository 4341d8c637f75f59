"""Prints the oldest version of every package that pyproject.toml admits, as requirements: `torch==2.9.0`.

With `--lock REPORT` it prints what pip found for them (`pip install --dry-run --report REPORT`): `ops/oldest.txt`.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LOADED = ("nvidia-cuda-runtime", "nvidia-cuda-cupti", "nvidia-cufile")
"""CUDA libraries that torch calls without a GPU, too: 12 MB. `ops/oldest_libraries.py` replaces the others."""


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


def locked(report: dict[str, Any]) -> list[str]:
    """`name==version` of everything that pip's report would install, without CUDA's large libraries."""
    metadata = [entry["metadata"] for entry in report["install"]]
    kept = [each for each in metadata if not each["name"].startswith("nvidia-") or each["name"].startswith(LOADED)]
    return sorted((f"{each['name']}=={each['version']}" for each in kept), key=str.lower)


def bounds() -> list[str]:
    """`oldest` of this project."""
    return oldest(tomllib.loads(PROJECT.read_text())["project"]["dependencies"])


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--lock"]:
        print("\n".join(locked(json.loads(Path(arguments[1]).read_text()))))
    else:
        print("\n".join(bounds()))


if __name__ == "__main__":
    main(sys.argv[1:])
