"""The `cmscale` command. A user's mistake is one line and exit status 2; a fault exits with 1."""

import os
import sys

import typer

from cmscale.cli import evaluation, facts, runs, sampling, weights
from cmscale.config.site import use_site
from cmscale.errors import DamagedInput, UserError, one_line

# Commands import torch when they are called, so that `cmscale --help` and `cmscale runs` answer at once.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for group in (sampling, evaluation, weights, runs, facts):
    app.add_typer(group.app)


def main() -> None:
    """Entry point."""
    try:
        use_site()
        app()  # exits by itself, with 2 for a wrong command line
    except (UserError, DamagedInput) as error:
        print(f"cmscale: {error}", file=sys.stderr)
        sys.exit(2)
    except ConnectionError as error:
        print(f"cmscale: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"cmscale: {one_line(f'{os.fsdecode(error.filename)}: {error.strerror}')}", file=sys.stderr)
        sys.exit(2)
