"""What README and runbook quote exists: options of commands, events, messages, files and config keys."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from cmscale.config import known_keys

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "ops").glob("*.md"))]
CODE = [path for folder in ("cmscale", "launchers", "data_prep") for path in sorted((CHECKOUT / folder).rglob("*.py"))]
_COMMAND = re.compile(r"^\s+(?:python (?P<script>\S+\.py)|cmscale (?P<command>[a-z-]+))(?P<rest>[^#]*)")


@cache
def literals() -> list[str]:
    """Every string of the code; values that are formatted into it are `\\0`."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


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


def quotes(document: Path) -> list[str]:
    """The first cells of the runbook's tables: what an operator sees, in backticks."""
    cells = [line.split("|")[1] for line in document.read_text().splitlines() if line.startswith("| `")]
    return [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("quote", sorted(set(quotes(CHECKOUT / "ops" / "runbook.md"))))
def test_every_quote_of_the_runbook_is_in_the_code(quote: str) -> None:
    """Words between placeholders (capitals, dots, numbers) stand in one string of the code."""
    fragments = [
        part.strip(" ,()'/") for part in re.split(r"\.\.\.|…|[:;]|\bstep N\b|\b[A-Z][A-Z_]*\b|\b\d+\b|step-N", quote)
    ]
    for fragment in fragments:
        fragment = fragment.removeprefix("evaluation_")  # the launchers put it before the events of evaluations
        if len(fragment) > 5 and fragment != "scontrol requeue":
            assert any(fragment in literal for literal in literals()), fragment


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_quoted_config_key_exists(document: Path) -> None:
    sections = "|".join(sorted({key.split(".")[0] for key in known_keys()}))
    quoted = re.findall(rf"`({sections})\.([a-z_0-9]+)", document.read_text())
    assert [
        f"{section}.{leaf}" for section, leaf in quoted if leaf != "conf" and f"{section}.{leaf}" not in known_keys()
    ] == []
