"""The options of commands and the config keys that documents quote exist."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from cmscale.config import known_keys

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "ops").glob("*.md"))]
_COMMAND = re.compile(r"^\s+(?:python (?P<script>\S+\.py)|cmscale (?P<command>[a-z-]+))(?P<rest>[^#]*)")


def commands(document: Path) -> set[tuple[str, str]]:
    """(script or subcommand, flag) of every command line in a document's code blocks."""
    found = set()
    text = document.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if match := _COMMAND.match(line):
            name = match["script"] or f"cmscale {match['command']}"
            found |= {(name, flag) for flag in ["", *re.findall(r"(--[a-z][a-z0-9-]*)", match["rest"])]}
    return found


@cache
def help_of(name: str) -> str:
    command = ["-m", "cmscale.cli", name.split()[1]] if name.startswith("cmscale ") else [str(CHECKOUT / name)]
    ran = subprocess.run(
        [sys.executable, *command, "--help"], capture_output=True, text=True, check=True, env={"COLUMNS": "200"}
    )
    return ran.stdout


@pytest.mark.parametrize(("name", "flag"), sorted(set().union(*map(commands, DOCUMENTS))))
def test_every_option_of_a_quoted_command_exists(name: str, flag: str) -> None:
    assert re.search(rf"{flag}\b", help_of(name)), f"{name} has no {flag}"


def test_the_readme_quotes_every_command() -> None:
    quoted = {name for name, _ in commands(CHECKOUT / "README.md")}
    assert {"launchers/submit.py", "launchers/evaluate.py", "data_prep/prepare.py", "cmscale sample"} <= quoted


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_quoted_config_key_exists(document: Path) -> None:
    sections = "|".join(sorted({key.split(".")[0] for key in known_keys()}))
    quoted = re.findall(rf"`({sections})\.([a-z_0-9]+)", document.read_text())
    assert [
        f"{section}.{leaf}" for section, leaf in quoted if leaf != "conf" and f"{section}.{leaf}" not in known_keys()
    ] == []
