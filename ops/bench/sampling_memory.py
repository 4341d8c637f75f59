"""Measures that the memory of `cmscale sample` does not grow with the number of samples.

    python ops/bench/sampling_memory.py [--samples 64,512] [--channels 32] [--image-size 256] [--batch-size 16]
                                        [--json FILE] [--against FILE]

Each number of samples is drawn by the command itself in a process of its own, from random weights of a narrow network,
to an `.npz`; the figure is the peak of its resident memory. What all samples would take as float32 is shown beside it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import harness
from harness import Row

from cmscale.commands.use import USED
from cmscale.config import parse_config
from cmscale.errors import UserError
from cmscale.interop import write_safetensors
from cmscale.io.process import CHECKOUT
from cmscale.model.unet import build_unet

CONFIG = """
method: {{kind: ct, distance: l2}}
model: {{image_size: {size}, channels: {channels}, channel_multipliers: [1], num_res_blocks: 1,
        attention_resolutions: [], head_channels: {channels}}}
data: {{path: nowhere}}
optimizer: {{learning_rate: 1.0e-4}}
train: {{total_steps: 1, global_batch_size: 1, micro_batch_size: 1}}
ema: {{rates: [0.9]}}
"""


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add("--samples", use=USED, default="64,512", help="numbers of samples (default: 64,512)")
    parser.add("--channels", use=USED, type=int, default=32)
    parser.add("--image-size", use=USED, type=int, default=256)
    parser.add("--batch-size", use=USED, type=int, default=16)
    given = harness.parse(parser)
    try:
        counts = [int(part) for part in given.samples.split(",")]
    except ValueError:
        raise UserError(f"--samples {given.samples}: write whole numbers such as 64,512") from None
    load = os.getloadavg()[0]
    rows, first = [], f"{counts[0]} samples: peak"
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(CONFIG.format(size=given.image_size, channels=given.channels))
        model = Path(folder) / "model.safetensors"
        weights = build_unet(config.model, seed=1).state_dict()
        write_safetensors(model, weights, config=config, step=1, weights_name="ema_0.9")
        for count in counts:
            peaks = [_peak(model, count, given.batch_size, Path(folder)) for _ in range(given.rounds)]
            rows.append(Row(f"{count} samples: peak", "MiB", peaks, baseline=None if count == counts[0] else first))
            whole = count * 3 * given.image_size**2 * 4 / 2**20
            rows.append(Row(f"{count} samples: as float32", "MiB", [whole] * given.rounds))
    facts = {"image_size": given.image_size, "channels": given.channels, "batch": given.batch_size}
    return harness.report(given, rows, facts=facts, load=load)


def _peak(model: Path, count: int, batch: int, folder: Path) -> float:
    """The peak of the resident memory of the command, MiB."""
    out = folder / "samples.npz"
    for old in folder.glob("samples.npz*"):
        old.unlink()
    command = [sys.executable, __file__, "--child", str(model), str(count), str(batch), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(model: str, count: str, batch: str, out: str) -> None:
    """Draws as the command does, and prints the peak."""
    from cmscale.cli.app import run

    run(["sample", model, "--samples", count, "--batch-size", batch, "--out", out, "--device", "cpu"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(harness.run(main))
