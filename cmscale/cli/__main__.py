"""Runs the command as `python -m cmscale.cli`."""

from cmscale.cli.main import main

main()
