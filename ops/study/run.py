"""Trains every method on small photographs from pip packages, on equal images, and writes a page of what they learn.

    python ops/study/run.py --out runs/study --ranks 2           # a night on two processors; again to go on
    python ops/study/run.py --out runs/study --hours 1           # ends after an hour, with the page so far
    python ops/study/run.py --out runs/study --methods cd,scd --seeds 1 --images 6000 --batch 16
    python ops/study/run.py --out runs/study --image-size 16 --images 12000 --batch 16

The data, the trainings and the evaluations are made by the public commands. Every method comes with the first seed
before any comes with the second. Killed at any moment, the same command goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import argparse
import math
import time

from study.commands import Runner
from study.page import write_page
from study.plan import SEEDS, Settings, Study, in_order, read_asked, read_recipes
from study.results import read_results

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED, Use
from cmscale.errors import UserError
from cmscale.io.locks import hold
from cmscale.io.place import Place


def main(arguments: list[str]) -> int:
    """Runs the study. Returns its exit status: 1 if a command failed, 128 + a signal if one ended it.

    Raises:
        UserError: a mistake in the command line, or another process runs the study.
    """
    flags, _ = command_parser().read(arguments)
    out = flags.out.local("the folder of a study").absolute()
    if flags.page_only:
        study, names, seeds = _asked(flags, out)
        print(f"page: {write_page(study, read_results(study, names, seeds))}")
        return 0
    with hold(out / ".lock", timeout=0, what=f"--out {out}"):
        return _run(flags, out)


def _asked(flags: argparse.Namespace, out: Path) -> tuple[Study, list[str], int]:
    """The study, the recipes to run, and the number of seeds. Only a study that runs writes down what was asked."""
    given = {name: getattr(flags, name) for name in ("images", "batch", "pictures", "samples", "image_size", "device")}
    kept = read_asked(out, given, {"methods": flags.methods, "seeds": flags.seeds})
    if flags.page_only and not kept.is_there:
        raise UserError(f"--page-only: there is no study in {out}")
    if kept.settings.batch % flags.ranks:
        raise UserError(f"--ranks {flags.ranks}: does not divide the batch of {kept.settings.batch} images")
    study = Study(out, kept.settings, read_recipes(), flags.ranks)
    names = in_order(study.recipes, kept.methods or list(study.recipes))
    if not flags.page_only:
        kept.write(out)
    return study, names, kept.seeds or SEEDS


def _run(flags: argparse.Namespace, out: Path) -> int:
    """Runs the study as far as it comes, and writes its page."""
    began = time.monotonic()
    study, names, seeds = _asked(flags, out)
    for seed in range(seeds):
        for name in names:
            study.write_config(study.recipes[name], seed)
    runner = Runner(
        out,
        deadline=None if flags.hours is None else began + 3600 * flags.hours,
        environment={"CMSCALE_CACHE": str(out / "cache")},
    )
    commands = list(study.commands(names, seeds))
    failed = runner.run_all(study.commands(names, seeds), count=len(commands))
    if runner.stopped is not None:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + runner.stopped
    left = sum(not runner.is_done(command) for command in commands)
    print(f"page: {write_page(study, read_results(study, names, seeds))}")
    if left:
        print(f"{len(commands) - left} of {len(commands)} commands are done; the same command goes on")
    return int(bool(failed))


def command_parser() -> CommandParser:
    """The command line."""
    default = Settings()
    kept = "kept by a study that goes on"
    parser = CommandParser(prog="run.py", description=__doc__)
    parser.add("--out", use=USED, type=Place, required=True, metavar="DIR", help="folder of the study: runs and page")
    parser.add("--hours", use=Use(excludes=("page_only",)), type=_hours, metavar="H", help="end after so many hours")
    parser.add("--methods", use=USED, type=_names, metavar="A,B", help="recipes, with those they start from (all)")
    parser.add("--seeds", use=USED, type=whole_number(1), metavar="N", help=f"trainings of each method ({SEEDS})")
    for name, about in {
        "images": f"images that each method sees ({default.images}; {kept})",
        "batch": f"images of a step ({default.batch}; {kept})",
        "pictures": f"training pictures ({default.pictures}; {kept})",
        "samples": f"samples of each evaluation ({default.samples}; {kept})",
        "image-size": f"side of the pictures, px ({default.image_size}; {kept})",
    }.items():
        parser.add(f"--{name}", use=USED, type=whole_number(2 if name == "samples" else 1), metavar="N", help=about)
    parser.add("--device", use=USED, choices=("cpu", "cuda"), help=f"device ({default.device}; {kept})")
    parser.add(
        "--ranks",
        use=Use(excludes=("page_only",)),
        type=whole_number(1),
        default=1,
        metavar="N",
        help="processes of a training (default: 1)",
    )
    parser.add("--page-only", use=USED, action="store_true", help="write the page so far, also beside a running study")
    return parser


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; it should be a number of hours above 0")
    return hours


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


if __name__ == "__main__":
    leave(guarded(main))
