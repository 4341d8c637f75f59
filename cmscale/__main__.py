"""Runs the command as `python -m cmscale`."""

from cmscale.cli.main import main

main()
