"""A mistake of a user is found before torch is imported, which takes seconds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from evaluation_fixtures import write_dataset, write_trained_run
from PIL import Image

from cmscale.config import read_config
from cmscale.interop import write_safetensors
from cmscale.model.unet import build_unet

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
sys.modules["torch"] = None  # an import of it fails
from cmscale.cli.app import run
from cmscale.commands.ending import guarded
from data_prep import prepare, reference, verify
from launchers import evaluate, sample, submit
for line in json.loads(sys.argv[1]):
    program, *words = line
    scripts = {"submit": submit, "evaluate": evaluate, "sample": sample, "prepare": prepare, "verify": verify}
    scripts["reference"] = reference
    main = run if program == "cmscale" else getattr(scripts[program], "run", scripts[program].main)
    print(guarded(main, words, label=" ".join(line)), flush=True)
"""
LINES = [
    ["cmscale", "sample", "nowhere", "--out", "x.npz"],
    ["cmscale", "sample", "run", "--out", "x.png"],
    ["cmscale", "sample", "run", "--out", "x.npz", "--checkpoint", "8"],
    ["cmscale", "sample", "run", "--out", "x.npz", "--weights", "ema_0.7"],
    ["cmscale", "sample", "run", "--out", "x.npz", "--sampling-times", "500"],
    ["cmscale", "sample", "model.safetensors", "--out", "x.npz", "--checkpoint", "7"],
    ["cmscale", "sample", "model.safetensors", "--out", "x.npz", "--config", "config.yaml"],
    ["cmscale", "edit", "inpaint", "nowhere", "a.png"],
    ["cmscale", "edit", "colorize", "run", "gone.png"],
    ["cmscale", "edit", "colorize", "run"],
    ["cmscale", "edit", "interpolate", "teacher"],
    ["cmscale", "edit", "interpolate", "run", "photo.png"],
    ["cmscale", "edit", "inpaint", "run", "photo.png", "--mask", "gone.png"],
    ["cmscale", "edit", "inpaint", "run", "photo.png", "--mask", "photo.png"],
    ["cmscale", "edit", "inpaint", "run", "photo.png", "--box", "0,0,99,99"],
    ["cmscale", "edit", "superres", "run", "photo.png", "--factor", "3"],
    ["cmscale", "edit", "denoise", "run", "photo.png", "--sigma", "400"],
    ["cmscale", "edit", "denoise", "run", "run/config.yaml"],
    ["cmscale", "edit", "denoise", "run", "photo.png", "--out", "photo.png"],
    ["cmscale", "sample", "run", "--out", "x.npz", "--noise", "photo.png"],
    ["cmscale", "export", "run"],
    ["cmscale", "ema", "run", "--length", "7"],
    ["cmscale", "consistency-error", "run", "--data", "nowhere"],
    ["cmscale", "consistency-error", "run", "--teacher", "run"],
    ["cmscale", "evaluate", "run", "--features-weights", "run/config.yaml"],
    ["cmscale", "evaluate", "run", "--reference", "run"],
    ["cmscale", "evaluate", "run", "--reference", "run/config.yaml"],
    ["cmscale", "evaluate", "run", "--reference", "huge"],
    ["cmscale", "evaluate", "model.safetensors", "--reference", "data"],
    ["cmscale", "evaluate", "pictures"],
    ["cmscale", "sample", "run", "--out", "x.gif"],
    ["cmscale", "export", "run", "--to", "x.safetensors", "--weights", "ema_0.7"],
    ["cmscale", "export", "run", "--to", "x.xyz"],
    ["cmscale", "export", "run", "--to", "x.safetensors", "--format", "openai"],
    ["cmscale", "export", "run", "--to", "x.safetensors", "--license", "My own"],
    ["cmscale", "import", "model.safetensors", "--to", "x.pt"],
    ["cmscale", "ema", "run", "--length", "0.05", "--to", "x.xyz"],
    ["cmscale", "ema", "run", "--length", "0.05"],
    ["cmscale", "verify", "nowhere"],
    ["cmscale", "evaluate", "run", "--weights", "ema_0.7"],
    ["cmscale", "evaluate", "run", "--checkpoint", "8"],
    ["cmscale", "evaluate", "nowhere"],
    ["cmscale", "evaluate", "run", "--features-weights", "gone.pth"],
    ["cmscale", "search-times", "run", "--checkpoint", "8"],
    ["cmscale", "consistency-error", "nowhere"],
    ["cmscale", "consistency-error", "teacher"],
    ["cmscale", "estimate", "absent.yaml"],
    ["cmscale", "report", "nowhere"],
    ["cmscale", "runs", "nowhere"],
    ["cmscale", "config", "explain", "train.sed"],
    ["submit", "absent.yaml"],
    ["submit", "run/config.yaml", "train.sed=1"],
    ["evaluate", "nowhere"],
    ["evaluate", "run", "--weights", "ema_0.7"],
    ["sample", "run", "--out", "x.npz", "--sampling-times", "500"],
    ["prepare", "--source", "folder:nowhere", "--format", "mds", "--out", "x"],
    ["prepare", "--source", "folder:run", "--format", "xyz", "--out", "x"],
    ["verify", "nowhere"],
    ["reference", "nowhere", "--out", "x.npz"],
    ["reference", "data", "--out", "x.txt"],
    ["reference", "data", "--out", "x.npz", "--format", "xyz"],
    ["reference", "data", "--out", "x.npz", "--format", "edm", "--features", "efficientnet"],
    ["reference", "data", "--out", "x.npz", "--features-weights", "photo.png"],
]


def test_mistakes_are_found_without_torch(tmp_path: Path) -> None:
    prepared = write_dataset(tmp_path / "made")
    run = write_trained_run(tmp_path / "run", data=tmp_path / "data")
    write_trained_run(tmp_path / "teacher", data=tmp_path / "data", kind="edm", method="sigma_data: 0.5")
    (tmp_path / "pictures").mkdir()
    for name in ("photo.png", "pictures/one.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    for name in ("data", "huge"):
        shutil.copytree(prepared, tmp_path / name)
    manifest = tmp_path / "huge/manifest.json"
    manifest.write_text(manifest.read_text().replace('"count": 40', '"count": 50001'))
    config = read_config(run.config)
    write_safetensors(
        tmp_path / "model.safetensors",
        build_unet(config.model).state_dict(),
        config=config,
        step=7,
        weights_name="ema_0.9",
    )
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(LINES)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(CHECKOUT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said = ran.stderr.splitlines()
    assert ran.stdout.split() == ["2"] * len(LINES), ran.stderr
    assert len(said) == len(LINES)
    assert not any("torch" in line for line in said), ran.stderr
