"""The entry point of the command `cmscale`. It imports the commands last, so that Ctrl-C then is one line, too."""

import os

from cmscale.commands.ending import end_early_interrupts, guarded, leave


def main() -> None:
    """Runs the command line of this process, and ends the process."""
    end_early_interrupts()
    leave(guarded(_run, label="cmscale"))


def _run(arguments: list[str]) -> int:
    from cmscale.cli.app import COMPLETE, complete, run
    from cmscale.config.site import use_site

    if instruction := os.environ.get(COMPLETE):
        return complete(instruction)
    use_site()
    return run(arguments)
