"""Makes and reads the small runs of the fault tests: data, config, launching, results."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from cmscale.config import dump_config, parse_config
from cmscale.runs.folder import RunDir
from cmscale.runs.log import latest_metrics, read_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from data_fixtures import encoded_images, write_lmdb

from data_prep.prepare import main as prepare

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS = 9
CONFIG = """
method: {kind: ct, distance: l2, s1: 6}
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_resolutions: [4],
        head_channels: 32, dropout: 0.1}
data: {path: DATA, num_canonical_nodes: 2, workers: 0}
optimizer: {learning_rate: 1e-3}
ema: {rates: [0.9, 0.5]}
engine: {device: cpu, collective_timeout_minutes: 1.0}
train: {total_steps: 9, global_batch_size: 8, micro_batch_size: 2, log_every: 1}
checkpoint: {every_steps: 3, keep_last: 10}
wandb: {mode: off}
restart: {backoff_seconds: 0, signal_seconds: 5}
slurm: {cpus_per_task: 1}
"""


def make_data(folder: Path) -> Path:
    """A prepared data set of fifty 8 px images."""
    source = write_lmdb(folder / "photos_lmdb", encoded_images(50))
    arguments = ["--source", f"lsun:{source}", "--format", "webdataset", "--image-size", "8", "--encoding", "png"]
    assert prepare([*arguments, "--out", str(folder / "set"), "--samples-per-shard", "20"]) == 0
    return folder / "set"


def make_run(root: Path, data: Path | str, *overrides: str) -> RunDir:
    run = RunDir(root)
    run.logs.mkdir(parents=True)
    run.config.write_text(dump_config(parse_config(CONFIG, [f"data.path={data}", *overrides])))
    return run


def launch(run: RunDir, worker: str, *arguments: str, num_ranks: int = 2) -> subprocess.Popen[str]:
    """The project's launcher on this machine, in a process of its own, over a worker of the tests."""
    code = f"""
        from pathlib import Path
        from cmscale.config import read_config
        from cmscale.runs.folder import RunDir
        from launchers.clusters import CLUSTERS
        from launchers.jobs import JobSpec
        from launchers.placement import Placement
        run = RunDir(Path({str(run.root)!r}))
        config = read_config(run.config)
        placement = Placement("local", 1, {num_ranks}, False, None, None, config.slurm, config.restart)
        job = JobSpec({worker!r}, {(str(run.root), *arguments)!r}, run, placement)
        raise SystemExit(CLUSTERS["local"].run(job, wait=True))
    """
    paths = [str(CHECKOUT), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(run: RunDir) -> list[float]:
    metrics = latest_metrics(run)
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    return [record["loss"] for record in metrics]


def last_weights(run: RunDir) -> dict[str, bytes]:
    """The rank files of the last checkpoint."""
    found = {path.name: path.read_bytes() for path in sorted(run.checkpoint(STEPS).glob("rank-*"))}
    assert found
    return found


def assert_equal(run: RunDir, golden: RunDir) -> None:
    """Asserts that losses and final weights are equal bit for bit."""
    assert losses(run) == losses(golden)
    assert last_weights(run) == last_weights(golden)


def events(run: RunDir, *kinds: str) -> list[dict]:
    """The run's events of these kinds, in order."""
    return [record for record in read_lines(run.events) if record["event"] in kinds]


def outcomes(outputs: list[str]) -> list:
    """The last line of each rank's output, which names how it ended."""
    return [json.loads(output.splitlines()[-1]) for output in outputs]
