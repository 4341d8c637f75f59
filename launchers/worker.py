"""Trains as one rank of any launcher that sets RANK and WORLD_SIZE: the same command on every rank.

    torchrun --nproc-per-node 8 launchers/worker.py --name NAME --runs-dir DIR CONFIG [key=value ...]

Every rank runs the same command, in a folder of runs that all nodes share. Rank 0 makes the run if there is none of
this name; else the ranks continue it, so a launcher may start the same command again after a fault. Ranks meet at
MASTER_ADDR and MASTER_PORT. The variables of Open MPI, MPICH, Intel MPI and srun are read where RANK is not set.

Exit status: 0 if training has finished, or if a newer start of the run has taken over; 2 after a user's mistake; 75 if
the rank was asked to stop (SIGTERM) and saved: start the command again to continue; 1 after a fault.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import argparse
import os
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NoReturn

from cmscale.commands.ending import INTERRUPTED, hide_warnings_of_pillow
from cmscale.commands.parser import CommandParser
from cmscale.commands.use import USED
from cmscale.config import Config, dump_config, read_config
from cmscale.config.site import site_layers, use_site
from cmscale.errors import NoSpace, NotExported, UserError
from cmscale.io.durable import replace_durably
from cmscale.io.place import Place
from cmscale.io.process import exit_at_once, note_early_signals
from cmscale.io.remarks import say
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import RunDir
from cmscale.runs.snapshot import read_code, take_snapshot
from launchers.beginning import resumed_config, split_items
from launchers.checks import check_inputs
from launchers.command_line import runs_dir
from launchers.heartbeat import beating
from launchers.jobs import MEET, TRAIN, load_worker
from launchers.provenance import record_start
from launchers.run_folders import create_run, new_run, with_absolute_paths

STOPPED = 75  # EX_TEMPFAIL: the same command continues
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OF_LAUNCHERS = (
    _NAMES,
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Intel MPI and MPICH
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


def main(arguments: list[str]) -> NoReturn:
    """Runs this rank to its end. Ends the process."""
    note_early_signals()
    hide_warnings_of_pillow()
    try:
        use_site(interactive=False)
        end = train(command_parser().read(arguments)[0])
    except UserError as error:
        for line in error.args:
            print(f"error: {line}", file=sys.stderr, flush=True)
        exit_at_once(1 if isinstance(error, NoSpace) else 2)
    except NotExported as error:
        print(f"finished, not exported: {error}", file=sys.stderr, flush=True)
        exit_at_once(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        exit_at_once(INTERRUPTED)
    except Exception:
        traceback.print_exc()
        exit_at_once(1)
    say(end)
    exit_at_once(STOPPED if end == "preempted" else 0)


def train(flags: argparse.Namespace) -> str:
    """Trains as this process's rank.

    Returns:
        `finished`, `preempted` or `superseded`.

    Raises:
        UserError: a mistake in the command, the config, the inputs or the launcher's variables.
    """
    os.environ.update(rank_variables(os.environ))
    file, overrides = split_items(flags.items)
    run = new_run(name=flags.name, runs_dir=runs_dir(flags), stem="")
    config = _config(run, file, overrides)
    config.storage.apply()
    load_worker(MEET)(
        config.engine.device,
        timeout_minutes=config.engine.collective_timeout_minutes,
        prepare=lambda: prepare(run, file, overrides),
    )
    with ExitStack() as stack:
        if os.environ["RANK"] == "0":
            stack.enter_context(beating(run))
        return load_worker(TRAIN)(str(run.root), flags.fresh)


def prepare(run: RunDir, file: str | None, overrides: list[str]) -> None:
    """Makes the run's folder, or checks that the run may go on with this config. Called on rank 0.

    Raises:
        UserError: the inputs are missing, or the config differs where losses would change.
    """
    code = read_code()
    if run.config.is_file():
        config = resumed_config(run, file, overrides)
        check_inputs(config, begins=not committed_steps(run))
        replace_durably(run.config, dump_config(config).encode())
        record_start(run, code, take_snapshot(code, run.code))
    else:
        config = _config(run, file, overrides)
        check_inputs(config)
        create_run(run, config, code)


def _config(run: RunDir, file: str | None, overrides: list[str]) -> Config:
    """The config of the command, or of the run where the command names none."""
    if file is None and not run.config.is_file():
        raise UserError(f"no config given, and there is no run {run.root} to continue: worker.py [flags] CONFIG")
    if file is None:
        return read_config(run.config, overrides, resolved=True)
    return with_absolute_paths(read_config(file, overrides, beneath=site_layers()))


def rank_variables(given: Mapping[str, str]) -> dict[str, str]:
    """The variables by which torch.distributed finds ranks, from those of whatever launcher started this process.

    A process without such variables is the only rank. Where nothing counts the ranks of a node, it has one.

    Raises:
        UserError: a variable is missing or no number, or MASTER_ADDR is.
    """
    known = [names for names in _OF_LAUNCHERS if names[0] in given]
    known.sort(key=lambda names: names[0] != "RANK" and names[2] not in given)  # MPICH's kin share PMI_RANK
    names = known[0] if known else _NAMES
    defaults = {names[0]: "0", names[1]: "1", names[2]: "0", names[3]: given.get(names[1], "1")}
    if names[0] in given and names[1] not in given:
        raise UserError(f"{names[0]} is set and {names[1]} is not; the launcher must set both")
    if names[2] not in given:
        defaults[names[3]] = "1"
    found = {}
    for name, source in zip(_NAMES, names, strict=True):
        value = given.get(source, defaults[source]).partition("(")[0]  # srun counts as in `4(x2)`
        if not value.isdecimal():
            raise UserError(f"{source}: got {given[source]!r}; it should be a whole number")
        found[name] = value
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise UserError(f"{names[0]}: got {found['RANK']}; it should be below {names[1]} {found['WORLD_SIZE']}")
    if int(found["WORLD_SIZE"]) > 1 and not given.get("MASTER_ADDR"):
        raise UserError(
            "MASTER_ADDR is not set; set it to the address of rank 0's node, and MASTER_PORT to a free port"
        )
    return found


def command_parser() -> CommandParser:
    """The command line. Where a run is begun or continued by the same command, no option is without an effect."""
    parser = CommandParser(prog="worker.py", description=__doc__)
    parser.add("--name", use=USED, required=True, help="name of the run, the same at every start")
    parser.add(
        "--runs-dir", use=USED, type=Place, metavar="DIR", help="folder of runs (default: the site's, or ./runs)"
    )
    parser.add("--fresh", use=USED, action="store_true", help="start from step 0 if no checkpoint can be loaded")
    parser.add(
        "items",
        use=USED,
        nargs="*",
        metavar="CONFIG [key=value ...]",
        help="a YAML file, and values that override its own",
    )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
