"""The help, versions, completion and former names of options, of every command."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run
from typer.main import get_command

from cmscale import __version__
from cmscale.cli.app import app
from cmscale.commands.former import FORMER, with_current_names
from cmscale.commands.parser import CommandParser
from cmscale.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = ("launchers.submit", "launchers.evaluate", "data_prep.prepare", "data_prep.verify", "data_prep.reference")


def commands(program: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    inner = getattr(program, "commands", {})
    if not inner:
        yield words
    for name, command in inner.items():
        yield from commands(command, (*words, name))


@pytest.mark.parametrize("words", sorted(commands(get_command(app))), ids=" ".join)
def test_every_command_has_a_plain_help_by_both_names(words: tuple[str, ...], monkeypatch, capsys) -> None:
    shown = []
    for flag in ("-h", "--help"):
        assert run(monkeypatch, *words, flag) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "╭" not in shown[0]
    assert not re.findall(r"<\w[^|>]*>", shown[0])  # no types, choices alone: <npz|png|tar>
    assert not re.search(r"[{}]", shown[0])
    assert run(monkeypatch, *words, "--version") == 0
    assert capsys.readouterr().out == f"cmscale {__version__}\n"


@pytest.mark.parametrize("words", [(), ("config",)], ids=["cmscale", "cmscale config"])
def test_a_group_alone_shows_its_help_and_ends_with_status_2(words: tuple[str, ...], monkeypatch, capsys) -> None:
    assert run(monkeypatch, *words, "--help") == 0
    shown = capsys.readouterr().out
    assert run(monkeypatch, *words) == 2
    assert capsys.readouterr() == (shown, "")
    assert not re.search(r"\w\.\.\.$", shown, re.MULTILINE)  # whole sentences


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_them_too(name: str, capsys) -> None:
    parser = importlib.import_module(name).command_parser()
    for flag, words in (("-h", "usage:"), ("--version", f"cmscale {__version__}")):
        with pytest.raises(SystemExit, match="0"):
            parser.read([flag])
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "completion", shell) == 0
    assert "_CMSCALE_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"),
    [("export --format di", ["diffusers"]), ("config explain train.lo", ["train.log_every"])],
)
def test_bash_completes_values(words: str, completed: list[str]) -> None:
    variables = {"_CMSCALE_COMPLETE": "complete_bash", "COMP_WORDS": f"cmscale {words}", "COMP_CWORD": "3"}
    ran = subprocess.run(
        [sys.executable, "-m", "cmscale"],
        env={**os.environ, **variables, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == completed


def test_former_names_are_read_with_a_notice(capsys) -> None:
    known = {"--samples", "--checkpoint", "--steps"}
    given = ["x", "--num", "3", "--step=7", "--steps", "2", "--", "--num"]
    assert with_current_names(given, known) == ["x", "--samples", "3", "--checkpoint=7", "--steps", "2", "--", "--num"]
    assert capsys.readouterr().err == "notice: --num is now --samples, --step is now --checkpoint; write that\n"
    assert with_current_names(["--weights", "a"], {"--weights", "--features-weights"}) == ["--weights", "a"]
    assert with_current_names(["--limit", "3"], {"--steps"}) == ["--limit", "3"]
    with pytest.raises(UserError, match="--num: is the former name of --samples, which is given too"):
        with_current_names(["--num", "3", "--samples=4"], known)
    assert capsys.readouterr().err == ""


def test_the_list_of_commands_fits_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "-h") == 0
    listed = capsys.readouterr().out.partition("Commands:")[2].partition("Training:")[0].strip().splitlines()
    program: Any = get_command(app)
    assert [line.split()[0] for line in listed] == list(program.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_no_command_has_an_option_of_a_former_name() -> None:
    options: dict[str, set[str]] = {}
    for words in commands(get_command(app)):
        found = get_command(app)
        for word in words:
            found = found.commands[word]
        options[" ".join(words)] = {flag for parameter in found.params for flag in parameter.opts}
    for name in SCRIPTS:
        parser: CommandParser = importlib.import_module(name).command_parser()
        options[name] = {flag for action in parser._actions for flag in action.option_strings}
    for name, flags in options.items():
        former = flags & FORMER.keys()
        # --weights names weights of the model that is sampled, and no command has a file of that name
        assert former <= {"--weights"}, f"{name}: one idea has one name, see cmscale/commands/former.py"
    assert "--weights" not in options["data_prep.reference"]
