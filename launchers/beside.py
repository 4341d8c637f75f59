"""Owns evaluations beside training: for every N-th checkpoint a job of its own, asked for once.

`submit.py --evaluate-every N` has it run in the training job's batch script on Slurm, which needs nobody logged in and
comes back with the job; on this machine beside the launcher. It looks for committed checkpoints and starts
`launchers/evaluate.py RUN --step K`; a file in the run's logs says of each step that it was asked for.
"""

import argparse
import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cmscale.config import Config, read_config
from cmscale.errors import UserError
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir, step_of
from launchers.plan import Plan

LOOK_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_CHECKOUT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Looks for due checkpoints until SIGTERM, and then once more. `RUN --every N [--once] -- FLAGS of evaluate.py`."""
    own, flags = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="launchers.beside", usage="%(prog)s RUN --every N [--once] -- FLAG ...")
    parser.add_argument("run", type=Path)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--once", action="store_true", help="look once; otherwise until SIGTERM, and then once more")
    given = parser.parse_args(own)
    run, stop = RunDir(given.run), threading.Event()
    if given.once:
        stop.set()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # nobody waits for ever for a launcher that was killed
    while not stop.wait(LOOK_SECONDS):
        ask_for_all(run, every=given.every, flags=flags)
    ask_for_all(run, every=given.every, flags=flags)
    return 0


def ask_for_all(run: RunDir, *, every: int, flags: list[str]) -> None:
    """Starts the evaluation of each checkpoint that is due; what Slurm did not take is tried at the next look."""
    for step in due(run, every=every):
        marker = run.asked_evaluation(step)
        marker.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another start of the job was faster
            marker.open("x").close()
            command = [sys.executable, str(_CHECKOUT / "launchers" / "evaluate.py"), *flags, str(run.root)]
            ran = subprocess.run([*command, "--step", str(step)], env=outside_of_jobs(), check=False)
            print(f"evaluation of step {step}: exit status {ran.returncode}", flush=True)
            if ran.returncode not in (0, 2) and "local" not in flags:  # not submitted, and another try may be
                marker.unlink()


def due(run: RunDir, *, every: int) -> Iterator[int]:
    """Steps of committed checkpoints that are to be evaluated and were not yet: every N-th, and the last."""
    last = read_config(run.config).train.total_steps
    found = {step_of(path.parent.name) for path in run.checkpoints.glob(f"step-*/{CHECKPOINT_MANIFEST}")}
    for step in sorted(found):
        if step and (step % every == 0 or step == last) and not run.asked_evaluation(step).exists():
            yield step


def outside_of_jobs() -> dict[str, str]:
    """The environment without what sbatch gave this job, and would take for its options again."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"
    }


def with_kept_checkpoints(config: Config, every: int) -> Config:
    """The config with the checkpoints that are to be evaluated kept until they are.

    Raises:
        UserError: there will be no such checkpoints.
    """
    saved = config.checkpoint.every_steps
    if every < 1 or every % saved:
        raise UserError(f"--evaluate-every {every}: checkpoints are written every {saved} steps; give a multiple of it")
    kept = config.checkpoint.model_copy(update={"keep_every": math.gcd(every, config.checkpoint.keep_every)})
    return config.model_copy(update={"checkpoint": kept})


def arguments_of(run: RunDir, plan: Plan, every: int) -> tuple[str, ...]:
    """What this module is to be started with: evaluations of one node, of the training job's kind."""
    flags = ["--cluster", plan.cluster, "--gpus-per-node", str(plan.ranks_per_node if plan.cluster == "slurm" else 1)]
    flags += ["--partition", plan.partition] if plan.partition else []
    return (str(run.root), "--every", str(every), "--", *flags)


@contextlib.contextmanager
def kept_beside(arguments: tuple[str, ...]) -> Iterator[Callable[[], None]]:
    """Runs this module while the body trains, on this machine.

    Yields:
        What to call when training went well: waits for the last evaluations. Otherwise they end with the body.
    """
    if not arguments:
        yield lambda: None
        return
    command = [sys.executable, "-m", "launchers.beside", *arguments]
    path = os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def finish() -> None:
        process.terminate()
        process.wait()
        subprocess.run([*command[:3], "--once", *arguments], env=environment, check=False)  # it may have just begun

    try:
        yield finish
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
