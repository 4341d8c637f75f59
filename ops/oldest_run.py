"""Imports every module, trains on two ranks with ZeRO-2 and resumes: what `ops/oldest.sh` does with old packages."""

import importlib
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = """
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_resolutions: [4],
        head_channels: 32, dropout: 0.1}
data: {path: DATA, workers: 1}
optimizer: {learning_rate: 1e-3}
engine: {device: cpu, zero_stage: 2}
method: {kind: ct, distance: l2, s1: 6}
train: {total_steps: 6, global_batch_size: 4, micro_batch_size: 2, log_every: 1}
checkpoint: {every_steps: 3}
wandb: {mode: off}
"""


def import_everything() -> int:
    """Imports every module of the packages. Returns how many there are."""
    count = 0
    for root in ("cmscale", "launchers", "data_prep"):
        for found in pkgutil.walk_packages(importlib.import_module(root).__path__, f"{root}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
                count += 1
    return count


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    versions = f"torch {torch.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}"
    print(versions, flush=True)
    modules = import_everything()
    print(f"imported {modules} modules", flush=True)

    def run(script: str, *arguments: str | Path) -> None:
        subprocess.run([sys.executable, CHECKOUT / script, *arguments], cwd=folder, check=True)

    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(16):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    data, config, runs = folder / "set", folder / "config.yaml", folder / "runs"
    config.write_text(CONFIG.replace("DATA", str(data)))
    prepared = ("--source", f"folder:{pictures}", "--format", "webdataset", "--image-size", "8", "--encoding", "png")
    run("data_prep/prepare.py", *prepared, "--out", data)
    local = ("--cluster", "local", "--gpus-per-node", "2", "--runs-dir", runs)
    run("launchers/submit.py", *local, "--name", "six", config)

    from cmscale.runs.folder import RunDir, step_name
    from cmscale.runs.log import latest_metrics

    trained = RunDir(runs / "six")
    first = latest_metrics(trained)
    shutil.rmtree(trained.root / "checkpoints" / step_name(6))  # so that the last three steps are trained again
    run("launchers/submit.py", *local[:4], "--resume", trained.root)
    again = latest_metrics(trained)
    losses = [[record["loss"] for record in records] for records in (first, again)]
    assert len(losses[0]) == 6, losses
    assert losses[0] == losses[1], losses
    print(f"losses of both trainings: {losses[1]}")
    print(f"{versions}: imported {modules} modules, two ranks with ZeRO-2, resumed to the same losses")
    return 0


if __name__ == "__main__":
    sys.exit(main())
