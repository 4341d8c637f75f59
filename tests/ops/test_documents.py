"""The options of commands and the config keys that documents quote exist."""

import importlib
import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from option_scenes import SCENES
from typer.main import get_command
from typer.testing import CliRunner

from cmscale.cli.app import app
from cmscale.config import known_keys, read_config
from cmscale.config.methods import METHODS_BY_KIND

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


def test_the_readme_links_every_methods_paper() -> None:
    text = DOCUMENTS[0].read_text()
    for kind, section in METHODS_BY_KIND.items():
        assert re.search(rf"^\| `{kind}` \|", text, re.MULTILINE), kind
        assert f"({section.facts.paper})" in text, kind


def lines_of(document: Path) -> list[list[str]]:
    """The words of the command lines in a document's code blocks; of torchrun's, those of the script that it starts."""
    found = []
    for line in document.read_text().replace("\\\n", " ").splitlines():
        if re.match(r"\s+(?:python \S+\.py|cmscale|torchrun) ", line) and "..." not in line.partition("#")[0]:
            words = shlex.split(line, comments=True)
            if words[0] == "torchrun":
                words = ["python", *words[next(place for place, word in enumerate(words) if word.endswith(".py")) :]]
            found.append(words)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_quoted_command_line_is_understood(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmscale.commands.parser.check_output", lambda *_: None)  # the places are not there
    monkeypatch.chdir(CHECKOUT)
    program: Any = get_command(app)
    for words in lines_of(document):
        if words[0] == "cmscale":
            command, rest = program, words[1:]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(words[1], list(rest))
        elif "--format lines" not in " ".join(words):  # of the guide that adds this format
            module = importlib.import_module(words[1].removesuffix(".py").replace("/", ".").removeprefix("ops."))
            module.command_parser().read(words[2:])
        overrides = [word for word in words[2:] if re.match(r"[a-z_]+\.[a-z_.]+=", word)]
        for config in (word for word in words[2:] if word.startswith("configs/")):
            read_config(config, overrides)


def test_every_quoted_command_is_executed_by_a_test() -> None:
    """The scenes of `tests/commands/test_every_option.py` execute commands; the others have tests of their own."""
    scenes = {"launchers/submit.py": "submit", "launchers/evaluate.py": "evaluate-job"}
    scenes |= {"launchers/sample.py": "sample-job", "data_prep/reference.py": "reference"}
    scenes |= {"data_prep/prepare.py": "prepare", "data_prep/verify.py": "verify-set"}
    tested = {"ops/soak.py": "distributed/test_soak.py", "ops/study/run.py": "ops/test_study.py"}
    tested |= {"launchers/worker.py": "launchers/test_worker.py"}
    executed = {scene.command for scene in SCENES}
    for words in (each for document in DOCUMENTS for each in lines_of(document)):
        if words[1] in tested:
            assert (CHECKOUT / "tests" / tested[words[1]]).is_file()
        elif words[0] == "python":
            assert scenes[words[1]] in executed
        else:
            named = (words[1], " ".join(words[1:3]))
            assert executed & {*named} or words[1] == "config", words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_in_the_text_belongs_to_a_command(document: Path) -> None:
    helps = [help_of(name) for name in [*SCRIPTS, *(f"cmscale {name}" for name in get_command(app).commands)]]
    helps += [(CHECKOUT / "ops" / script).read_text() for script in ("test.sh", "demo.sh", "oldest.sh")]
    text = re.sub(r"`docker [^`]*`|container --shm-size|torchrun [^\n]*(?= launchers/)", "", document.read_text())
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


@pytest.mark.parametrize("guide", ["adding_a_format", "adding_a_method", "adding_a_metric"])
def test_the_linter_accepts_the_files_of_a_guide(guide: str) -> None:
    text = (CHECKOUT / "ops" / f"{guide}.md").read_text()
    files = re.findall(r"<!-- new file: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL)
    assert files
    for path, program in files:
        for check in (["check"], ["format", "--check"]):
            command = [sys.executable, "-m", "ruff", *check, "--stdin-filename", str(CHECKOUT / path), "-"]
            ran = subprocess.run(command, cwd=CHECKOUT, input=program, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, f"{path}: {ran.stdout}{ran.stderr}"
