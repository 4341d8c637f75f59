"""Evaluates a model on all ranks, on Slurm or here: `evaluate.py [flags] SOURCE [key=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

from cmscale.commands.ending import leave
from cmscale.commands.parser import CommandParser
from cmscale.config.requests import EvaluateRequest
from cmscale.runs.requested import check_request
from launchers.checks import check_evaluation, check_source
from launchers.command_line import add_cluster_flags, guarded
from launchers.jobs import EVALUATE
from launchers.request_flags import add_request_flags, read_request
from launchers.source_jobs import SourceJob


def main(arguments: list[str]) -> int:
    """Submits or runs the evaluation. Returns its exit status, 0 once submitted. Raises UserError."""
    flags, given = command_parser().read(arguments)
    source = SourceJob(flags, given, verb="evaluate")
    request = read_request(flags, given, EvaluateRequest, device=source.device, run_dir=str(source.run.root.absolute()))
    if source.config is not None:
        request.settings(source.config.evaluate)
        request.check_fits(source.config)
    request.refuse_several_in_one_file()
    job = source.plan(EVALUATE, request)
    if flags.dry_run:
        return source.show(job)
    check_source(flags.source, key="SOURCE")
    check_request(request)
    check_evaluation(source.config, asked=request.model_dump(mode="json", exclude_unset=True))
    return source.start(job)


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="evaluate.py", description=__doc__)
    add_cluster_flags(parser)
    add_request_flags(parser, EvaluateRequest)
    return parser


if __name__ == "__main__":
    leave(guarded(main))
