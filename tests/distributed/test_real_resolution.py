"""Tests of the LSUN configs at 256 px: training with a narrow network, a forward pass of the full one."""

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from cmscale.config import dump_config, read_config
from cmscale.runs.folder import RunDir
from cmscale.runs.log import latest_metrics
from data_prep.demo import VIEWS, crops, write_lmdb
from data_prep.prepare import main as prepare

CONFIG = Path(__file__).parents[2] / "configs" / "lsun_bedroom_ct.yaml"
NARROWED = [
    "model.channels=32",
    "model.num_res_blocks=1",
    "model.head_channels=32",
    "method.distance=l2",  # LPIPS needs VGG's weights
    "train.total_steps=10",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "train.log_every=1",
    "engine.device=cpu",
    "engine.precision=fp32",
    "data.workers=0",
    "checkpoint.export_to=null",
    "wandb.mode=off",
    "train.sample_every=0",
]


@pytest.mark.slow
def test_the_bedroom_config_narrowed_trains_ten_steps_at_256_px(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "photos_lmdb", crops(VIEWS["astronaut"], count=12, side=256, seed=0))
    arguments = ["--source", f"lsun:{tmp_path / 'photos_lmdb'}", "--format", "mds", "--out", str(tmp_path / "set")]
    assert prepare(arguments) == 0
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(dump_config(read_config(CONFIG, [*NARROWED, f"data.path={tmp_path / 'set'}"])))
    sys.stdout.flush()
    run_ranks(2, "train_work:to_the_end", str(run.root))
    losses = [record["loss"] for record in latest_metrics(run)]
    assert len(losses) == 10
    assert all(0 < loss < 10 for loss in losses)
    assert run.checkpoint(10).is_dir()
