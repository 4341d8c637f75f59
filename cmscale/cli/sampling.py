"""The command that draws samples: `sample`."""

import typer

from cmscale.cli.command import command
from cmscale.cli.interruption import or_interrupted
from cmscale.cli.request_options import command_for
from cmscale.config.draw_request import DrawRequest

app = typer.Typer()


@command(app)
@command_for(DrawRequest)
def sample(request: DrawRequest) -> None:
    """Draws samples on this machine (launchers/sample.py: on a cluster). Continues where it was interrupted.

    The noise and class of sample i depend only on (seed, i). In a batch of another size the network rounds differently,
    which may change a pixel by 1 of 255 levels.
    """
    from cmscale.distributed.world import detect
    from cmscale.generation.draw_job import run_here

    places = or_interrupted(run_here(request))
    if detect("cpu").is_main:  # torchrun starts this on every rank
        for place in places:
            print(place)
