"""Makes one of every kind of file that a command reads, with the commands that read it."""

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from data_fixtures import encoded, smooth_image, write_lmdb
from edm_pickles import adm_unet, preconditioned, write_pickle
from evaluation_fixtures import build_cheap_features, write_dataset, write_snapshot, write_trained_run
from PIL import Image
from run_folder import write_evaluation

from cmscale.config import dump_config, parse_config, read_config
from cmscale.evaluation.reference.adm import write_adm
from cmscale.evaluation.reference.edm import write_edm
from cmscale.evaluation.reference.edm2 import write_edm2
from cmscale.evaluation.reference.reference import reference_from_images
from cmscale.interop import write_diffusers, write_openai, write_safetensors
from cmscale.model.unet import build_unet
from cmscale.runs.folder import RunDir
from cmscale.runs.results import TimeSearch
from data_prep import prepare
from data_prep.making.preparation import Preparation
from launchers.where import Recorded


@dataclass(frozen=True)
class Input:
    """A kind of file: the files that are damaged, one at a time, and the commands that read them."""

    name: str
    files: Sequence[Path]
    commands: Sequence[tuple[object, ...]]


def build_inputs(root: Path) -> list[Input]:
    """Every kind of file below a folder, with `OUT` for what a command writes."""
    data = write_dataset(root / "mds", count=12)
    run = write_trained_run(root / "runs/run", data=data)
    config = parse_config(run.config.read_text())
    config_file = root / "config.yaml"
    config_file.write_text(dump_config(config))
    run.metrics.write_text('{"step": 5, "loss": 0.5, "samples": 40}\n')
    run.events.write_text('{"time": 1.0, "event": "start", "step": 0, "rank": 0, "why": ""}\n')
    _fill(run)
    return [
        *_weights(root, run.root, config_file),
        *_runs(run.root, config_file),
        _snapshots(root / "averages" / "run", data),
        *_evaluations(root, run.root),
        *_pictures(root, run.root),
        *_data(root, data, run.root),
        *_sources(root),
    ]


def _fill(run: RunDir) -> None:
    """What a run's folder gets besides its config, its checkpoint and its logs."""
    run.samples.mkdir()
    (run.samples / "step-000000005.png").write_bytes(encoded(smooth_image(1), "png"))
    write_evaluation(run, step=7, nfe=1, values=(20.0, 21.0), weights="ema_0.9")
    start = {"time": "2026-01-02T03:04:05+00:00", "host": "node1", "git": "0123", "command": ["x"], "packages": {}}
    run.provenance.write_text(json.dumps({"starts": [start]}))
    recorded = Recorded(cluster="local", nodes=1, gpus_per_node=1, partition=None, minutes=None)
    recorded.write(run)


def _weights(root: Path, run: Path, config_file: Path) -> list[Input]:
    config = parse_config(config_file.read_text())
    weights = build_unet(config.model).state_dict()
    write_openai(root / "openai.pt", weights, model=config.model)
    torch.save(weights, root / "older.pt", _use_new_zipfile_serialization=False)
    described = {"config": config, "step": 1, "weights_name": "master"}
    write_safetensors(root / "own.safetensors", weights, **described)
    write_diffusers(root / "diffusers", weights, **described)
    net = adm_unet(size=4, width=128, multipliers=[1], blocks=1, attention=[], labels=0)
    write_pickle(root / "edm.pkl", preconditioned(net))
    pickled = (
        "method.kind=edm model.image_size=4 model.channels=128 model.head_channels=64 model.scale_shift_norm=true "
        "model.noise_embedding_scale=1.0"
    )
    edm_config = root / "edm.yaml"
    edm_config.write_text(dump_config(parse_config(EDM_CONFIG, [*pickled.split()])))
    given = ("--config", config_file)
    diffusers = [path for path in (root / "diffusers").rglob("*") if path.is_file()]
    return [
        Input(
            "config",
            [config_file],
            [
                ("cmscale", "estimate", config_file, "--gpus-per-node", 2),
                ("cmscale", "import", root / "openai.pt", *given, "--to", "OUT/x.safetensors"),
                ("submit", config_file, "--cluster", "local", "--dry-run", "--runs-dir", "OUT"),
            ],
        ),
        Input(
            "openai",
            [root / "openai.pt"],
            [("cmscale", "import", root / "openai.pt", *given, "--to", "OUT/x.safetensors")],
        ),
        Input(
            "older",
            [root / "older.pt"],
            [("cmscale", "import", root / "older.pt", *given, "--to", "OUT/x.safetensors")],
        ),
        Input(
            "safetensors",
            [root / "own.safetensors"],
            [
                ("cmscale", "export", root / "own.safetensors", "--format", "openai", "--to", "OUT/x.pt"),
                ("cmscale", "sample", root / "own.safetensors", "--samples", 1, "--out", "OUT/x.npz"),
            ],
        ),
        Input("diffusers", diffusers, [("cmscale", "import", root / "diffusers", "--to", "OUT/x.safetensors")]),
        Input(
            "nvlabs",
            [root / "edm.pkl"],
            [("cmscale", "import", root / "edm.pkl", "--config", edm_config, "--to", "OUT/x.safetensors")],
        ),
    ]


EDM_CONFIG = """
method: {kind: edm}
model: {image_size: 4, channels: 128, channel_multipliers: [1], num_res_blocks: 1}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-2}
train: {total_steps: 100, global_batch_size: 8, micro_batch_size: 2}
"""


def _runs(run: Path, config_file: Path) -> list[Input]:
    del config_file
    files = [path for path in run.rglob("*") if path.is_file()]
    other = run.with_name("other")
    shutil.copytree(run, other)
    return [
        Input(
            "run",
            files,
            [
                ("cmscale", "runs", run.parent),
                ("cmscale", "report", run),
                ("cmscale", "compare", run, other),
                ("cmscale", "verify", run),
                ("submit", "--resume", run, "--cluster", "local", "--dry-run"),
                ("evaluate", "--cluster", "local", "--dry-run", run),
                ("cmscale", "export", run, "--to", "OUT/x.safetensors"),
                ("cmscale", "sample", run, "--samples", 1, "--out", "OUT/x.npz"),
                ("resume", run, "OUT"),
            ],
        ),
        Input(
            "checkpoint",
            [path for path in files if path.parent.parent.name == "checkpoints"],
            [("resume", run, "OUT"), ("cmscale", "verify", run)],
        ),
    ]


def _snapshots(folder: Path, data: Path) -> Input:
    """A run that keeps snapshots of averages, as if ZeRO-3 had written them."""
    run = write_trained_run(folder, data=data, overrides=("ema.lengths=[0.1,0.2]",))
    for step in (3, 7):
        write_snapshot(run, read_config(run.config, resolved=True), step=step, zero_stage=3)
    commands = [
        ("cmscale", "ema", folder),
        ("cmscale", "ema", folder, "--length", 0.1, "--to", "OUT/x.safetensors"),
        ("cmscale", "verify", folder),
        ("resume", folder, "OUT"),
    ]
    return Input("snapshot", [path for path in run.snapshots.rglob("*") if path.is_file()], commands)


def _evaluations(root: Path, run: Path) -> list[Input]:
    images = np.random.default_rng(0).integers(0, 256, size=(24, 8, 8, 3), dtype=np.uint8)
    np.savez_compressed(root / "samples.npz", arr_0=images)
    measured = reference_from_images(images, build_cheap_features(), name="images", count=24)
    write_adm(root / "adm.npz", measured, iter(images))
    np.savez(root / "images.npz", arr_0=images)
    np.savez(root / "stats.npz", mu=measured.pooled.mean, sigma=measured.pooled.covariance, arr_0=images)
    write_edm(root / "edm.npz", measured)
    write_edm2(root / "edm2.pkl", measured)
    statistics = {"mu": measured.pooled.mean, "sigma": measured.pooled.covariance}
    torch.save(statistics, root / "fidelity.pt")
    torch.save(statistics, root / "older_fidelity.pt", _use_new_zipfile_serialization=False)
    np.save(root / "noise.npy", np.zeros((1, 3, 8, 8), np.float32))
    search = TimeSearch(
        step=7, weights="ema_0.9", steps=2, last=150, score_name="FID", num_samples=10, seed=0, complete=True,
        indices=(0, 75), times=(80.0, 2.0), score=1.0, protocol={},
    )  # fmt: skip
    (root / "times.json").write_bytes(search.to_bytes())
    names = ("adm.npz", "images.npz", "stats.npz", "edm.npz", "edm2.pkl", "fidelity.pt", "older_fidelity.pt")
    evaluate = ("cmscale", "evaluate", root / "samples.npz", "--features", "inception", "--out", "OUT/x.json")
    return [
        *(Input(name, [root / name], [(*evaluate, "--reference", root / name)]) for name in names),
        Input("samples", [root / "samples.npz"], [(*evaluate, "--reference", root / "edm.npz")]),
        Input(
            "noise",
            [root / "noise.npy"],
            [("cmscale", "sample", run, "--samples", 1, "--noise", root / "noise.npy", "--out", "OUT/x.npz")],
        ),
        Input(
            "times",
            [root / "times.json"],
            [("cmscale", "sample", run, "--samples", 1, "--sampling-times", root / "times.json", "--out", "OUT/x.npz")],
        ),
    ]


def _pictures(root: Path, run: Path) -> list[Input]:
    folder = root / "pictures"
    folder.mkdir()
    for number in range(6):
        kind = ("png", "jpeg", "webp")[number % 3]
        (folder / f"{number}.{kind}").write_bytes(encoded(smooth_image(number, width=8, height=8), kind))
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(root / "mask.png")
    picture = folder / "0.png"
    edit = ("cmscale", "edit", "inpaint", run, picture, "--steps", 2, "--out", "OUT/x.png")
    evaluate = ("cmscale", "evaluate", folder, "--features", "inception", "--reference", root / "edm.npz")
    return [
        Input("folder", list(folder.iterdir()), [(*evaluate, "--out", "OUT/x.json")]),
        Input("picture", [picture], [edit]),
        Input("mask", [root / "mask.png"], [(*edit, "--mask", root / "mask.png")]),
    ]


def _data(root: Path, data: Path, run: Path) -> list[Input]:
    images = data.parent / "images"
    tars = root / "webdataset"
    source = f"folder:{images}"
    made = ["--source", source, "--format", "webdataset", "--image-size", "8", "--encoding", "png", "--out", str(tars)]
    assert prepare.main(made) == 0
    found = []
    for name, folder in (("mds", data), ("webdataset", tars)):
        files = [path for path in folder.iterdir() if path.is_file()]
        commands = [
            ("verify", folder),
            ("verify", folder, "--repair", "--source", source),
            ("reference", folder, "--out", "OUT/x.npz", "--device", "cpu"),
            ("cmscale", "consistency-error", run, "--data", folder, "--samples", 1, "--out", "OUT/x.json"),
            ("prepare", *made[:-1], folder) if name == "webdataset" else ("verify", folder),
            ("load", folder),
        ]
        found.append(Input(f"data set {name}", files, commands))
    begun = root / "begun"
    with patch.object(Preparation, "publish", side_effect=KeyboardInterrupt):
        assert prepare.main([*made[:-1], str(begun)]) == 130
    files = [path for path in begun.glob(".progress/*.json") if path.is_file()]
    found.append(Input("preparation", files, [("continue", begun, "OUT", *made[:-2])]))
    return found


def _sources(root: Path) -> list[Input]:
    pictures = {
        f"{number:040x}": encoded(smooth_image(number), ("webp", "jpeg", "png")[number % 3]) for number in range(6)
    }
    write_lmdb(root / "lsun/x_train_lmdb", pictures)
    (root / "files").mkdir()
    for key, content in pictures.items():
        (root / f"files/{key}.png").write_bytes(content)
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for path in sorted((root / "files").iterdir()):
            archive.write(path, path.name)
    (root / "tars").mkdir()
    shutil.make_archive(str(root / "tars/images"), "tar", root / "files")
    rest = ("--format", "webdataset", "--image-size", 16, "--out", "OUT/data", "--workers", 1, "--max-bad")
    found = []
    for source, files in (
        (f"lsun:{root / 'lsun'}", [root / "lsun/x_train_lmdb/data.mdb"]),
        (f"folder:{root / 'files'}", list((root / "files").iterdir())),
        (f"zip:{root / 'images.zip'}", [root / "images.zip"]),
        (f"tars:{root / 'tars'}", [root / "tars/images.tar"]),
    ):
        commands = [("prepare", "--source", source, *rest, allowed) for allowed in (0, 5)]
        found.append(Input(source.partition(":")[0], files, commands))
    return found
