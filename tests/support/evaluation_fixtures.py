"""Writes a tiny data set and a run with a checkpoint in training's format, without DeepSpeed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from cmscale.config import Config, dump_config, parse_config, trajectory
from cmscale.engine.flat_space import count_elements, number_parameters
from cmscale.evaluation.features.extractor import FeatureExtractor, FeatureNetwork
from cmscale.model.unet import build_unet
from cmscale.runs.folder import RunDir, rank_file
from cmscale.runs.manifests import CheckpointManifest, FileEntry, RankPart, TrainState
from data_prep.prepare import main as prepare

TEXT = """
method: {{kind: {kind}, {method}}}
model: {{image_size: 8, channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_channels: 32}}
data: {{path: {data}}}
optimizer: {{learning_rate: 1.0e-2}}
train: {{total_steps: 100, global_batch_size: 8, micro_batch_size: 2}}
ema: {{rates: [0.9, 0.5]}}
engine: {{device: cpu}}
evaluate: {{features: efficientnet, num_samples: {samples}}}
"""


class Projection(FeatureNetwork):
    """A cheap stand-in for a feature network: a random projection of some pixels, under the name of a real one."""

    distance_name = "FD-EfficientNet"
    has_logits = True

    def __init__(self, label: str = "inception", *, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.label, self.width = label, width
        self.matrix = torch.randn(3 * 28 * 28, width + classes, generator=torch.Generator().manual_seed(0)) / 9

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True, align_corners=False)
        x = (x - 127) / 128
        found = x[:, :, ::8, ::8].flatten(1) @ self.matrix
        return {"pooled": found[:, : self.width].relu(), "logits": found[:, self.width :]}


def build_cheap_features(kind: str = "inception", **_: object) -> FeatureExtractor:
    """Replaces `build_features`."""
    return FeatureExtractor(Projection(kind), "0" * 64, torch.device("cpu"))


def write_dataset(folder: Path, *, count: int = 40, size: int = 8) -> Path:
    """A prepared data set of blurred noise, under `folder`."""
    source = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        coarse = source.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{number:04d}.png")
    arguments = ["--source", f"folder:{folder / 'images'}", "--format", "mds", "--image-size", str(size)]
    assert prepare([*arguments, "--encoding", "png", "--out", str(folder / "data")]) == 0
    return folder / "data"


def write_trained_run(
    root: Path,
    *,
    data: Path,
    kind: str = "ct",
    method: str = "distance: l2",
    step: int = 7,
    samples: int = 300,
    overrides: tuple[str, ...] = (),
) -> RunDir:
    """A run with one checkpoint of random weights, different for each EMA."""
    run = RunDir(root)
    config = parse_config(TEXT.format(kind=kind, method=method, data=data, samples=samples), list(overrides))
    run.checkpoint(step).mkdir(parents=True)
    run.config.write_text(dump_config(config))
    write_checkpoint(run, config, step=step)
    return run


def write_checkpoint(
    run: RunDir,
    config: Config,
    *,
    step: int,
    data_fingerprint: str = "data",
    scalars: dict[str, float] | None = None,
) -> None:
    """Writes a checkpoint of one rank."""
    names = ("master", *config.ema.names, *config.ema.power_names)
    _write(run.checkpoint(step), names, config, step=step, data_fingerprint=data_fingerprint, scalars=scalars or {})


def write_snapshot(run: RunDir, config: Config, *, step: int, zero_stage: int = 0) -> None:
    """Writes a snapshot of the averages by a power function."""
    names, folder = config.ema.power_names, run.snapshot(step)
    _write(folder, names, config, step=step, data_fingerprint="data", scalars={}, zero_stage=zero_stage)


def _write(
    folder: Path,
    names: Sequence[str],
    config: Config,
    *,
    step: int,
    data_fingerprint: str,
    scalars: dict[str, float],
    zero_stage: int = 0,
) -> None:
    with torch.device("meta"):
        parameters = number_parameters(build_unet(config.model))
    total = count_elements(parameters)
    source = torch.Generator().manual_seed(step)
    quantities = {name: 0.05 * torch.randn(total, generator=source) for name in names}
    path = folder / rank_file(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(quantities, path)
    data = path.read_bytes()
    entry = FileEntry(name=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = CheckpointManifest(
        state=TrainState(step=step, cursor=8 * step),
        generation=1,
        num_ranks=1,
        zero_stage=zero_stage,
        config_fingerprint=config.fingerprint(),
        config=config.model_dump(mode="json"),
        trajectory=trajectory(config),
        data_fingerprint=data_fingerprint,
        scalars=scalars,
        quantities=tuple(quantities),
        parameters=parameters,
        num_elements=total,
        part_size=total,
        parts=(RankPart(file=entry),),
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
