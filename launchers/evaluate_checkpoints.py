"""Evaluates checkpoints while training goes on: a job of its own for every N-th, requested once.

On Slurm the batch script of the training job runs it, so that nobody needs to stay logged in; on this machine the
launcher does. It looks for committed checkpoints and starts `launchers/evaluate.py RUN --checkpoint K` for each. A file
in the run's logs records that the evaluation of a step was requested; while it holds a process, by whom.
"""

import argparse
import contextlib
import hashlib
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from cmscale.config import Config, read_config
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.io.job_environment import outside_of_jobs
from cmscale.io.local import LocalStorage
from cmscale.io.process import CHECKOUT, die_with_parent, is_alive, node_name, start_of
from cmscale.io.remarks import say
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir
from cmscale.runs.log import write_event
from launchers.placement import Placement

LOOK_SECONDS = 10.0
AGAIN_SECONDS = 120.0
"""After a look in which an evaluation could not be submitted, as Slurm did not answer or the queue was full."""


def main(arguments: list[str]) -> int:
    """Looks for due checkpoints until SIGTERM, and then once more: `RUN --every N [--once] -- FLAGS`."""
    own, flags = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="launchers.evaluate_checkpoints", usage="%(prog)s RUN --every N [--once] -- FLAG ..."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--every", type=int, required=True, metavar="N", help="evaluate every N-th step's checkpoint")
    parser.add_argument("--once", action="store_true", help="look once, instead of until SIGTERM")
    given = parser.parse_args(own)
    run, stop, is_here = RunDir(given.run), threading.Event(), "local" in flags
    if given.once:
        stop.set()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    die_with_parent(signal.SIGTERM)
    problem = ""
    while not stop.wait(AGAIN_SECONDS if problem and not is_here else LOOK_SECONDS):
        problem = look(run, every=given.every, flags=flags, before=problem)
    problem = look(run, every=given.every, flags=flags, before=problem)
    if given.once and not is_here:
        tell_missing(run, every=given.every)
    return int(bool(problem))


def look(run: RunDir, *, every: int, flags: list[str], before: str) -> str:
    """Calls `request_due`. Returns why that failed, and says so if it is another reason than before; empty if not.

    A file system that fails for a moment, or is full, ends no looking for days.
    """
    try:
        steps = request_due(run, every=every, flags=flags)
    except (OSError, UserError) as error:
        problem = " ".join(str(error).split())
        if problem != before:
            say(f"no evaluations are asked for at the moment: {problem}", to="stderr")
        return problem
    return f"not submitted: {steps}" if steps else ""


def tell_missing(run: RunDir, *, every: int) -> None:
    """Writes an event for each evaluation of a finished training that could not be submitted: nobody looks again."""
    with contextlib.suppress(OSError, UserError):
        if read_config(run.config).train.total_steps in committed_steps(run):
            for step in due(run, every=every):
                command = f"python launchers/evaluate.py {shlex.quote(str(run.root))} --checkpoint {step}"
                why = f"Slurm did not take it before the training ended; to evaluate: {command}"
                write_event(run, "evaluation_not_submitted", step=step, rank=0, why=why)


def request_due(run: RunDir, *, every: int, flags: list[str]) -> list[int]:
    """Starts the evaluation of each checkpoint that is due. Returns the steps of those that are due again.

    That is one about which Slurm did not answer, or which a full queue refused, and one on this machine that a signal
    ended. One that failed by itself is not: its own launcher has tried again.
    """
    again = []
    for step in due(run, every=every):
        marker = run.asked_evaluation(step, checkpoint_hash(run, step))
        if _is_abandoned(marker):
            marker.unlink(missing_ok=True)
        if not LocalStorage(marker.parent).write_if_absent(marker.name, _asking().encode()):
            continue  # another start of the job was faster
        command = [sys.executable, str(CHECKOUT / "launchers" / "evaluate.py"), *flags, str(run.root)]
        try:
            status = subprocess.run(
                [*command, "--checkpoint", str(step)],
                env=outside_of_jobs(),
                check=False,
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            ).returncode
        except BaseException:  # such as no memory for a process: else the marker would name this one, which lives on
            marker.unlink(missing_ok=True)
            raise
        say(f"evaluation of step {step}: exit status {status}")
        is_over = status in (0, 1, 2) if "local" in flags else status in (0, 2)
        if is_over:
            replace_durably(marker, b"", within=run.root)
        else:
            marker.unlink(missing_ok=True)
            again.append(step)
    return again


def due(run: RunDir, *, every: int) -> Iterator[int]:
    """Steps of committed checkpoints to evaluate whose evaluation was not requested yet: every N-th, and the last."""
    last = read_config(run.config).train.total_steps
    for step in committed_steps(run):
        if step and (step % every == 0 or step == last):
            markers = run.asked_evaluation(step, checkpoint_hash(run, step)), run.asked_evaluation(step)
            if not any(marker.exists() and not _is_abandoned(marker) for marker in markers):
                yield step


def checkpoint_hash(run: RunDir, step: int) -> str:
    """The SHA-256 of a checkpoint's manifest, which holds the hashes of its files; empty if it was just removed."""
    manifest = run.checkpoint(step) / CHECKPOINT_MANIFEST
    with contextlib.suppress(FileNotFoundError):
        state = manifest.stat()
        return _hash_of_file(manifest, state.st_mtime_ns, state.st_size)
    return ""


@cache
def _hash_of_file(path: Path, changed: int, size: int) -> str:
    """The hash of a file in this state; it is read once, as this module looks every few seconds."""
    del changed, size
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _asking() -> str:
    """What a marker holds while an evaluation is submitted, or runs on this machine; afterwards it is empty."""
    return f"{node_name()} {os.getpid()} {start_of(os.getpid())}"


def _is_abandoned(marker: Path) -> bool:
    """Whether the process that asked for an evaluation ended before that was over."""
    try:
        node, process, started, *_ = [*marker.read_text().split(), "", "", ""]
    except FileNotFoundError:
        return False
    if not process:
        return False
    started = started or start_of(int(process))  # of an earlier release
    return node != node_name() or not is_alive(int(process), started)


def with_kept_checkpoints(config: Config, every: int) -> Config:
    """The config, changed so that checkpoints to evaluate are kept.

    Raises:
        UserError: training will write no checkpoints at these steps.
    """
    saved = config.checkpoint.every_steps
    if every < 1 or every % saved:
        raise UserError(f"--evaluate-every {every}: checkpoints are written every {saved} steps; give a multiple of it")
    kept = config.checkpoint.model_copy(update={"keep_every": math.gcd(every, config.checkpoint.keep_every)})
    return config.model_copy(update={"checkpoint": kept})


def arguments_for(run: RunDir, placement: Placement, every: int) -> tuple[str, ...]:
    """The arguments of this module for a training job: evaluations run on one node of the same kind."""
    ranks = 1 if placement.cluster == "local" else placement.ranks_per_node
    gpus = f"{placement.gpu_type}:{ranks}" if placement.gpu_type else str(ranks)
    flags = ["--cluster", placement.cluster, "--gpus-per-node", gpus]
    flags += ["--partition", placement.partition] if placement.partition else []
    return (str(run.root), "--every", str(every), "--", *flags)


@contextlib.contextmanager
def evaluating(arguments: tuple[str, ...], *, python_path: str) -> Iterator[Callable[[], None]]:
    """Runs this module on this machine during the block; without arguments it does nothing.

    Args:
        python_path: Where it and the evaluations find the packages.

    Yields:
        A function to call if training finished: it waits for the last evaluations. Without the call they are ended
        together with the block.
    """
    if not arguments:
        yield lambda: None
        return
    program = [sys.executable, "-P", "-m", "launchers.evaluate_checkpoints"]
    command, once = [*program, *arguments], [*program, "--once", *arguments]
    environment = {**os.environ, "PYTHONPATH": python_path}
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def finish() -> None:
        process.terminate()
        process.wait()
        subprocess.run(once, env=environment, check=False)  # SIGTERM may have come before its handler was installed

    try:
        yield finish
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
