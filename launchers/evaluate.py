"""Evaluates a model on all ranks, on Slurm or here: `evaluate.py [flags] SOURCE [key=value ...]`."""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for a run from any folder

from cmscale.config import Config, read_config
from cmscale.errors import UserError
from cmscale.io.durable import explained
from cmscale.runs.folder import RunDir
from launchers.checks import check_evaluation, check_source, is_remote
from launchers.clusters import CLUSTERS
from launchers.command_line import add_cluster_flags, as_table, describe_placement, guarded, placement_from
from launchers.jobs import EVALUATE, JobSpec
from launchers.run_folders import new_run


def main(arguments: list[str]) -> int:
    """Submits or runs the evaluation. Returns its exit status, 0 once submitted. Raises UserError."""
    flags = _parser().parse_intermixed_args(arguments)
    config, run = where(flags)
    device = flags.device or (config.engine.device if config else "auto")
    placement = placement_from(flags, device=device, config=config)
    request = make_request(flags, device=device, run=run)
    rows = {name: str(value) for name, value in request.items() if value not in (None, [])}
    print(as_table({**describe_placement(placement), **rows}), flush=True)
    cluster, job = CLUSTERS[placement.cluster], JobSpec(EVALUATE, (request,), run, placement)
    if flags.dry_run:
        if preview := cluster.preview(job):
            print("\n" + preview)
        return 0
    check_source(flags.source, key="SOURCE")
    check_evaluation(config, asked=request)
    with explained(run.root):
        run.logs.mkdir(parents=True, exist_ok=True)
    status = cluster.run(job, wait=flags.wait)
    print(f"run: {run.root}", flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    add_cluster_flags(parser)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a run, a checkpoint folder, an exported file, an OpenAI .pt; or s3://",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    parser.add_argument("--config", metavar="CONFIG", help="of a SOURCE that brings none")
    parser.add_argument("--samples", type=_at_least(2), metavar="N", help="default: evaluate.num_samples of the config")
    parser.add_argument("--steps", metavar="1,2", help="numbers of sampling steps; default: the method's")
    parser.add_argument("--times", metavar="80,4.4|FILE.json", help="the sampler's times, or a search-times result")
    parser.add_argument("--step", default="latest", metavar="0,latest", help="of a run: its checkpoints' steps")
    parser.add_argument(
        "--seeds", type=_at_least(1), default=1, metavar="N", help="independent repetitions, for error bars"
    )
    parser.add_argument("--weights", metavar="A,B", help="EMAs' names, or master; default: the first EMA")
    parser.add_argument(
        "--reference", metavar="PATH", help="a prepared data set, a folder of images, a statistics file"
    )
    parser.add_argument("--features", choices=("inception", "dinov2", "efficientnet"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the config's engine.device")
    parser.add_argument("--inception-weights", metavar="PATH")
    parser.add_argument("--dinov2-weights", metavar="PATH")
    parser.add_argument("--out", metavar="FILE.json", help="default: in the run's evaluations/")
    return parser


def _at_least(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; it should be a whole number of at least {least}")
        return int(text)

    return parse


def where(flags: argparse.Namespace) -> tuple[Config | None, RunDir]:
    """The config of SOURCE (None: it is inside an exported file), and the run in whose folder the job works.

    Raises:
        UserError: a run that gets another name or config; overrides without a config.
    """
    source = Path(flags.source).expanduser()
    if not is_remote(flags.source):
        for root in (source, source.parent.parent):  # a run; RUN/checkpoints/step-…
            inside = root == source or source.parent.name == "checkpoints"
            if inside and (root / "config.yaml").is_file():
                for flag, value in (
                    ("--name", flags.name),
                    ("--config", flags.config),
                    ("key=value", flags.overrides),
                ):
                    if value:
                        raise UserError(f"{flag} {value}: {flags.source} is a run's and has its own; leave it out")
                return read_config(root / "config.yaml"), RunDir(root.absolute())
    if flags.overrides and not flags.config:
        raise UserError(f"override {flags.overrides[0]!r}: {flags.source} brings its own config; see --config")
    stem = flags.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "source"
    run = new_run(name=flags.name, runs_dir=flags.runs_dir, stem=f"evaluate-{stem}")
    return (read_config(flags.config, flags.overrides) if flags.config else None), run


def make_request(flags: argparse.Namespace, *, device: str, run: RunDir) -> dict[str, Any]:
    """What the worker is asked for, a `cmscale.evaluation.evaluate.Request`; None: as the config says."""
    return {
        "source": _absolute(flags.source),
        "checkpoints": flags.step,
        "weights": flags.weights,
        "steps": flags.steps,
        "times": _absolute(flags.times) if flags.times and flags.times.endswith(".json") else flags.times,
        "samples": flags.samples,
        "seeds": flags.seeds,
        "reference": _absolute(flags.reference),
        "features": flags.features,
        "inception_weights": _absolute(flags.inception_weights),
        "dinov2_weights": _absolute(flags.dinov2_weights),
        "out": _absolute(flags.out),
        "config": _absolute(flags.config),
        "overrides": flags.overrides,
        "device": device,
        "run_dir": str(run.root.absolute()),
    }


def _absolute(path: str | None) -> str | None:
    return path if path is None or is_remote(path) else str(Path(path).expanduser().absolute())


if __name__ == "__main__":
    sys.exit(guarded(main))
