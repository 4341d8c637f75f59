"""Draws samples on all ranks, on Slurm or here: `sample.py [flags] SOURCE --out PLACE [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

from cmscale.commands.ending import leave
from cmscale.commands.parser import CommandParser
from cmscale.config.draw_request import DrawRequest
from cmscale.runs.requested import check_drawn_by, check_request
from launchers.checks import check_source
from launchers.command_line import add_cluster_flags, guarded
from launchers.jobs import SAMPLE
from launchers.request_flags import add_request_flags, read_request
from launchers.source_jobs import SourceJob


def main(arguments: list[str]) -> int:
    """Submits or runs the drawing. Returns its exit status, 0 once submitted. Raises UserError."""
    flags, given = command_parser().read(arguments)
    source = SourceJob(flags, given, verb="sample")
    request = read_request(flags, given, DrawRequest, device=source.device)
    request.format_asked()
    if source.config is not None:
        check_drawn_by(request, source.config)
    job = source.plan(SAMPLE, request)
    if flags.dry_run:
        return source.show(job)
    check_source(flags.source, key="SOURCE")
    check_request(request)
    return source.start(job)


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="sample.py", description=__doc__)
    add_cluster_flags(parser)
    add_request_flags(parser, DrawRequest)
    return parser


if __name__ == "__main__":
    leave(guarded(main))
