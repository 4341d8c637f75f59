"""Runs the `cmscale` command in the test's process."""

import sys

import pytest

from cmscale.cli import main as cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["cmscale", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)
