"""The options of commands and the config keys that documents quote exist."""

import importlib
import io
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cmscale.cli.app import app
from cmscale.config import known_keys

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "ops").glob("*.md")), CHECKOUT / "ops/study/README.md"]
SCRIPTS = ["launchers/submit.py", "launchers/evaluate.py", "ops/soak.py", "data_prep/prepare.py", "data_prep/verify.py"]
SCRIPTS += ["data_prep/reference.py", "launchers/worker.py", "ops/study/run.py"]
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
    """What `--help` prints, in wide lines."""
    if name.startswith("cmscale "):
        shown = CliRunner().invoke(app, [*name.split()[1:], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        return shown.output
    main = importlib.import_module(name.removesuffix(".py").replace("/", ".").removeprefix("ops.")).main
    shown = io.StringIO()  # in this process: each script alone would import torch again
    with redirect_stdout(shown), pytest.raises(SystemExit, match="0"):
        main(["--help"])
    return shown.getvalue()


@pytest.mark.parametrize(("name", "flag"), sorted(set().union(*map(commands, DOCUMENTS))))
def test_every_option_of_a_quoted_command_exists(name: str, flag: str) -> None:
    assert re.search(rf"{flag}\b", help_of(name)), f"{name} has no {flag}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_in_the_text_belongs_to_a_command(document: Path) -> None:
    helps = [help_of(name) for name in [*SCRIPTS, *(f"cmscale {name}" for name in get_command(app).commands)]]
    helps += [(CHECKOUT / "ops" / script).read_text() for script in ("test.sh", "demo.sh")]
    text = re.sub(r"`docker [^`]*`|torchrun [^\n]*(?= launchers/)", "", document.read_text())
    for option in sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))):
        assert any(re.search(rf"{option}\b", shown) for shown in helps), option


def test_the_readme_quotes_every_command() -> None:
    quoted = {name for name, _ in commands(CHECKOUT / "README.md")}
    assert {"launchers/submit.py", "launchers/evaluate.py", "data_prep/prepare.py", "cmscale sample"} <= quoted


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_of_the_checkout_leads_somewhere(document: Path) -> None:
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [target for target in linked if not (document.parent / target).exists()] == []


def test_the_pictures_of_the_documents_are_small() -> None:
    pictures = list((CHECKOUT / "ops" / "pictures").glob("*.png"))
    assert pictures
    assert [path.name for path in pictures if path.stat().st_size > 250_000] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_quoted_config_key_exists(document: Path) -> None:
    sections = "|".join(sorted({key.split(".")[0] for key in known_keys()}))
    quoted = re.findall(rf"`({sections})\.([a-z_0-9]+)", document.read_text())
    assert [
        f"{section}.{leaf}" for section, leaf in quoted if leaf != "conf" and f"{section}.{leaf}" not in known_keys()
    ] == []
