"""Every option of every command has an effect, or giving it is refused before anything is computed.

A scene is a command line and what is special there: a kind of SOURCE, a task, a cluster. In every scene every option
of the command is given once, at a value that is not its default. Then either the outcome (files, output, or the job
that is submitted) differs from that of the command line alone, or the command ends with status 2 and writes nothing.
An option for which `VALUES` has no value fails the test: whoever adds an option adds a value here.
"""

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import TEXT, build_cheap_features, write_checkpoint, write_dataset, write_trained_run
from launch_fixtures import CONFIG, dataset
from PIL import Image
from run_folder import write_run

from cmscale.cli.app import run as run_cmscale
from cmscale.cli.command import COMMANDS
from cmscale.commands.ending import guarded
from cmscale.config import Config, dump_config, parse_config, read_config
from cmscale.consistency import grid
from cmscale.consistency.grid import off_grid_times
from cmscale.interop import write_diffusers, write_openai, write_safetensors
from cmscale.model.unet import build_unet
from data_prep import demo, prepare, reference, verify
from launchers import evaluate, submit
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.jobs import JobSpec

SCRIPTS = {"submit": submit, "evaluate-job": evaluate, "prepare": prepare, "verify-set": verify}
SCRIPTS |= {"reference": reference, "demo": demo}

AS_ELSEWHERE = {"device", "batch_size", "workers", "wait", "dry_run", "clip", "check_source", "take_over", "force"}
"""Options that say where and how, not what; and --clip, which changes the pixels of one step nowhere."""


@dataclass(frozen=True)
class Scene:
    """A command line in a situation.

    Attributes:
        refused: The options that must be refused there; all others must have an effect.
        values: Values of options in this scene, where `VALUES` has none that fits.
    """

    name: str
    command: str
    line: tuple[str, ...]
    refused: frozenset[str] = frozenset()
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)


OF_A_RUN = frozenset({"weights", "step", "checkpoints"})
OF_A_BARE_FILE = frozenset({"config", "overrides"})

# By command and option: the words on the command line, or None for what the line of every scene has already.
VALUES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "sample": {
        "source": None,
        "out": None,
        "num": ("--samples", "3"),
        "steps": ("--steps", "2"),
        "seed": ("--seed", "1"),
        "grid": ("--grid", "{out}/grid.png"),
        "noise": ("--noise", "{in}/noise.npy"),
        "times": ("--sampling-times", "70"),
        "sampler": ("--sampler", "euler"),
        "raw": ("--raw",),
        "clip": ("--no-clip",),
        "classes": ("--classes", "1"),
        "batch_size": ("--batch-size", "1"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
        "device": ("--device", "cpu"),
    },
    "edit": {
        "task": None,
        "source": None,
        "images": None,
        "out": ("--out", "{out}/other.png"),
        "strip": ("--strip", "{out}/strip.png"),
        "mask": ("--mask", "{in}/mask.png"),
        "box": ("--box", "0,0,2,2"),
        "factor": ("--factor", "2"),
        "sigma": ("--sigma", "3"),
        "steps": ("--steps", "3"),
        "count": ("--samples", "3"),
        "seed": ("--seed", "1"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "device": ("--device", "cpu"),
    },
    "evaluate": {
        "source": None,
        "overrides": ("method.sigma_max=40",),
        "reference": ("--reference", "{in}/other_images"),
        "samples": ("--samples", "13"),
        "features": ("--features", "inception"),
        "features_weights": ("--features-weights", "{in}/features.pth"),
        "inception_weights": ("--inception-weights", "{in}/features.pth"),
        "dinov2_weights": ("--dinov2-weights", "{in}/features.pth"),
        "config": ("--config", "{in}/other.yaml"),
        "device": ("--device", "cpu"),
        "force": ("--force",),
        "out": None,
        "steps": ("--steps", "2"),
        "times": ("--sampling-times", "70"),
        "seeds": ("--seeds", "2"),
        "weights": ("--weights", "master"),
        "checkpoints": ("--checkpoint", "3"),
    },
    "consistency-error": {
        "source": None,
        "data": ("--data", "{in}/other_data"),
        "out": None,
        "plot": ("--plot", "{out}/plot.png"),
        "num": ("--samples", "3"),
        "teacher": ("--teacher", "{in}/edm.safetensors"),
        "seed": ("--seed", "1"),
        "batch_size": ("--batch-size", "1"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
        "device": ("--device", "cpu"),
        "force": ("--force",),
    },
    "export": {
        "source": None,
        "to": None,
        "format": ("--format", "openai", "--to", "{out}/model.pt"),
        "weights": ("--weights", "master"),
        "step": ("--checkpoint", "3"),
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
    },
    "ema": {
        "run": None,
        "length": ("--length", "0.08"),
        "to": ("--to", "{out}/other.safetensors"),
        "step": ("--checkpoint", "3"),
    },
    "import": {
        "source": None,
        "to": None,
        "config": ("--config", "{in}/other.yaml"),
        "overrides": ("method.sigma_max=40",),
    },
    "estimate": {
        "config": None,
        "overrides": ("model.num_res_blocks=2",),
        "nodes": ("--nodes", "2"),
        "gpus_per_node": ("--gpus-per-node", "4"),
        "tflops": ("--tflops", "10"),
        "as_json": ("--json",),
    },
    "report": {"run": None, "beside": ("--beside", "{in}/shown_too")},
    "runs": {"runs_dir": None, "as_json": ("--json",), "watch": None},
    "compare": {"runs": None, "out": ("--out", "{out}/page.html"), "as_json": ("--json",)},
    "verify": {"run": None, "as_json": ("--json",)},
    "completion": {"shell": None},
    "doctor": {},
    "schema": {},
    "config explain": {"names": None, "as_json": ("--json",)},
    "config diff": {"configs": None, "as_json": ("--json",)},
    "submit": {
        "nodes": ("--nodes", "2"),
        "gpus_per_node": ("--gpus-per-node", "2"),
        "cluster": None,
        "partition": ("--partition", "gpu"),
        "time": ("--time", "30"),
        "name": ("--name", "another"),
        "runs_dir": ("--runs-dir", "{out}/elsewhere"),
        "dry_run": ("--dry-run",),
        "wait": ("--wait",),
        "resume": ("--resume", "{in}/launched"),
        "fresh": ("--fresh",),
        "take_over": ("--take-over",),
        "evaluate_every": ("--evaluate-every", "1000"),
        "items": ("train.seed=5",),
    },
    "evaluate-job": {
        "nodes": ("--nodes", "2"),
        "gpus_per_node": ("--gpus-per-node", "2"),
        "cluster": None,
        "partition": ("--partition", "gpu"),
        "time": ("--time", "30"),
        "name": ("--name", "another"),
        "runs_dir": ("--runs-dir", "{out}/elsewhere"),
        "dry_run": ("--dry-run",),
        "wait": ("--wait",),
    },
    "prepare": {
        "source": None,
        "format": ("--format", "webdataset"),
        "out": None,
        "workers": ("--workers", "1"),
        "image_size": ("--image-size", "4"),
        "preprocess": ("--preprocess", "edm"),
        "encoding": ("--encoding", "webp"),
        "exif": ("--exif", "apply"),
        "check_source": ("--check-source",),
        "samples_per_shard": ("--samples-per-shard", "2"),
        "max_bad": None,
        "slurm": None,
        "nodes": ("--nodes", "2"),
        "partition": ("--partition", "gpu"),
        "time": ("--time", "5"),
        "settings": ("slurm.account=us",),
    },
    "verify-set": {
        "dataset": None,
        "repair": None,
        "source": ("--source", "folder:{in}/images"),
        "workers": ("--workers", "2"),
    },
    "reference": {
        "dataset": None,
        "out": None,
        "format": ("--format", "edm"),
        "features": ("--features", "efficientnet"),
        "weights": ("--features-weights", "{in}/features.pth"),
        "device": ("--device", "cpu"),
        "limit": ("--samples", "5"),
        "subset": ("--subset", "4"),
    },
    "demo": {
        "folder": ("{out}/lmdb",),
        "picture": ("--picture", "{out}/picture.png"),
        "view": ("--view", "cat"),
        "count": ("--samples", "2"),
        "side": ("--side", "8"),
        "seed": ("--seed", "1"),
    },
}
VALUES["evaluate-job"] |= {name: value for name, value in VALUES["evaluate"].items() if name != "out"}
VALUES["evaluate-job"] |= {"out": ("--out", "{out}/result.json"), "config": ("--config", "{in}/other.yaml")}
VALUES["search-times"] = {}  # see test_a_search_refuses_as_an_evaluation_does

_SAMPLE = ("--samples", "2", "--out", "{out}/x.npz")
_EVALUATE = ("--samples", "12", "--reference", "{in}/images", "--out", "{out}/r.json")
_EXPORTED = OF_A_RUN | OF_A_BARE_FILE
_CURVE = ("--samples", "2", "--data", "{in}/data", "--out", "{out}/c.json")
_ONLY_CM = frozenset({"sampler", "classes"})
_IMAGE = ("{in}/cm.safetensors", "{in}/images/0000.png", "--out", "{out}/x.png")
_TASK_OPTIONS = frozenset({"mask", "box", "factor", "sigma", "steps", "count"})
_USED_BY_TASK = {
    "inpaint": {"mask", "box", "steps"},
    "colorize": {"steps"},
    "superres": {"factor", "steps"},
    "stroke": set(),
    "denoise": {"sigma"},
    "interpolate": {"count"},
}
_LOCAL = ("--cluster", "local")

SCENES = [
    Scene("of a run", "sample", ("{in}/run", *_SAMPLE), _ONLY_CM | OF_A_BARE_FILE),
    Scene(
        "of a checkpoint",
        "sample",
        ("{in}/run/checkpoints/step-000000007", *_SAMPLE),
        _ONLY_CM | OF_A_BARE_FILE | {"step"},
    ),
    Scene("of an exported file", "sample", ("{in}/cm.safetensors", *_SAMPLE), _ONLY_CM | _EXPORTED),
    Scene("of an OpenAI file", "sample", ("{in}/cm.pt", "--config", "{in}/config.yaml", *_SAMPLE), _ONLY_CM | OF_A_RUN),
    Scene("of a diffusers folder", "sample", ("{in}/diffusers", *_SAMPLE), _ONLY_CM | OF_A_RUN | OF_A_BARE_FILE),
    Scene(
        "of a diffusion model",
        "sample",
        ("{in}/edm.safetensors", *_SAMPLE, "--steps", "3"),
        _EXPORTED | {"classes", "times"},
        values={"steps": ("--steps", "2")},
    ),
    Scene(
        "with all noise given",
        "sample",
        ("{in}/cm.safetensors", *_SAMPLE, "--noise", "{in}/noise.npy"),
        _ONLY_CM | _EXPORTED | {"seed", "num"},  # another number does not fit the noise
        values={"noise": ("--noise", "{in}/other_noise.npy")},
    ),
    Scene(
        "with the start noise given",
        "sample",
        ("{in}/cm.safetensors", *_SAMPLE, "--noise", "{in}/noise.npy", "--sampling-times", "80,3"),
        _ONLY_CM | _EXPORTED | {"num", "steps"},
        values={"noise": ("--noise", "{in}/other_noise.npy")},
    ),
    Scene(
        "of a conditional model",
        "sample",
        ("{in}/conditional.safetensors", "--classes", "0", "--raw", *_SAMPLE),
        _EXPORTED | {"sampler", "clip"},
        values={"raw": ("--no-raw",)},
    ),
    Scene(
        "as raw samples",
        "sample",
        ("{in}/cm.safetensors", "--raw", *_SAMPLE),
        _ONLY_CM | _EXPORTED | {"clip"},
        values={"raw": ("--no-raw",)},
    ),
    *(
        Scene(
            task,
            "edit",
            (
                task,
                *(part for part in _IMAGE if task != "interpolate" or "images" not in part),
                *(("--steps", "4") if "steps" in used else ()),
            ),
            (_TASK_OPTIONS - used) | {"weights", "step", "config"} | ({"strip"} if task == "interpolate" else set()),
        )
        for task, used in _USED_BY_TASK.items()
    ),
    Scene(
        "with a run",
        "edit",
        ("colorize", "{in}/run", "{in}/images/0000.png", "--out", "{out}/x.png", "--steps", "4"),
        (_TASK_OPTIONS - {"steps"}) | {"config"},
    ),
    Scene(
        "of a run",
        "evaluate",
        ("{in}/run", *_EVALUATE),
        OF_A_BARE_FILE | {"inception_weights", "dinov2_weights"},
    ),
    Scene(
        "of an exported file",
        "evaluate",
        ("{in}/cm.safetensors", *_EVALUATE, "--features", "dinov2"),
        _EXPORTED | {"inception_weights"},
    ),
    Scene(
        "of finished samples",
        "evaluate",
        ("{in}/samples.npz", *_EVALUATE[2:]),
        _EXPORTED | {"samples", "steps", "times", "seeds", "dinov2_weights"},
        values={"features": ("--features", "efficientnet")},
    ),
    Scene("of a run", "consistency-error", ("{in}/run", *_CURVE), OF_A_BARE_FILE),
    Scene("of an exported file", "consistency-error", ("{in}/cm.safetensors", *_CURVE), _EXPORTED),
    Scene("a run", "export", ("{in}/run", "--to", "{out}/m.safetensors"), OF_A_BARE_FILE),
    Scene("an exported file", "export", ("{in}/cm.safetensors", "--to", "{out}/m.safetensors"), _EXPORTED),
    Scene("a run", "ema", ("{in}/averaged", "--length", "0.07", "--to", "{out}/m.safetensors")),
    Scene(
        "an OpenAI file",
        "import",
        ("{in}/cm.pt", "--config", "{in}/config.yaml", "--to", "{out}/m.safetensors"),
    ),
    Scene("an exported file", "import", ("{in}/cm.safetensors", "--to", "{out}/m.safetensors"), OF_A_BARE_FILE),
    Scene("a config", "estimate", ("{in}/config.yaml", "train.global_batch_size=64")),
    Scene("of a run", "report", ("{in}/shown",)),
    Scene("of the folder of runs", "runs", ("{in}/folder_of_runs",)),
    Scene("of two runs", "compare", ("{in}/run", "{in}/other_run")),
    Scene("of a run", "verify", ("{in}/run",)),
    Scene("of a key", "config explain", ("train.seed",)),
    Scene("of a shell", "completion", ("bash",)),
    Scene("of two configs", "config diff", ("{in}/config.yaml", "{in}/other.yaml")),
    Scene(
        "of a new run",
        "submit",
        (*_LOCAL, "--name", "one", "--runs-dir", "{out}/runs", "{in}/launch.yaml"),
        frozenset({"nodes", "partition", "fresh", "take_over", "resume"}),  # --name is given
    ),
    Scene(
        "of a run again",
        "submit",
        (*_LOCAL, "--resume", "{out}/launched"),
        frozenset({"nodes", "partition", "name", "runs_dir"}),
        values={"resume": ("--resume", "{out}/again"), "items": ("train.log_every=7",)},
    ),
    Scene(
        "on Slurm",
        "submit",
        ("--cluster", "slurm", "--dry-run", "--name", "one", "--runs-dir", "{out}/runs", "{in}/launch.yaml"),
        frozenset({"fresh", "take_over", "resume"}),
        values={"items": ("slurm.account=us",)},
    ),
    Scene(
        "of a run",
        "evaluate-job",
        (*_LOCAL, "{in}/run"),
        OF_A_BARE_FILE | {"nodes", "partition", "name", "runs_dir", "inception_weights", "dinov2_weights"},
    ),
    Scene(
        "of an OpenAI file",
        "evaluate-job",
        (*_LOCAL, "--name", "n", "--runs-dir", "{out}/runs", "{in}/cm.pt", "--config", "{in}/config.yaml"),
        OF_A_RUN | {"nodes", "partition", "inception_weights", "dinov2_weights"},
    ),
    Scene(
        "of a folder",
        "prepare",
        ("--source", "folder:{in}/images", "--format", "mds", "--image-size", "8", "--out", "{out}/set"),
        frozenset({"nodes", "partition", "time", "settings"}),
    ),
    Scene("of a set", "verify-set", ("{in}/data",), frozenset({"source"})),
    Scene("of a set", "reference", ("{in}/data", "--out", "{out}/r.npz")),
    Scene(
        "for EDM",
        "reference",
        ("{in}/data", "--out", "{out}/r.npz", "--format", "edm"),
        frozenset({"subset", "features"}),  # EDM's files hold Inception features alone
        values={"format": ("--format", "adm")},
    ),
    Scene("of a folder", "demo", ("{out}/lmdb", "--samples", "3"), values={"folder": ("--picture", "{out}/p.png")}),
    Scene(
        "of a picture",
        "demo",
        ("--picture", "{out}/p.png"),
        frozenset({"count"}),
        values={"folder": ("{out}/lmdb", "--samples", "2")},
    ),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `{in}`: a run with two checkpoints, exported weights, samples, noise, configs and data."""
    folder = tmp_path_factory.mktemp("inputs")
    data = write_dataset(folder / "made", count=8)
    data.rename(folder / "data")
    (folder / "made" / "images").rename(folder / "images")
    other = write_dataset(folder / "other", count=9)
    other.rename(folder / "other_data")
    (folder / "other" / "images").rename(folder / "other_images")
    run = write_trained_run(folder / "run", data=folder / "data", samples=12)
    config = parse_config(run.config.read_text())
    write_checkpoint(run, config, step=3)
    averaged = write_trained_run(folder / "averaged", data=folder / "data", overrides=("ema.lengths=[0.05,0.1]",))
    write_checkpoint(averaged, parse_config(averaged.config.read_text()), step=3)
    (folder / "config.yaml").write_text(run.config.read_text())
    (folder / "other.yaml").write_text(run.config.read_text().replace("sigma_max: 80.0", "sigma_max: 40.0"))
    weights = weights_of(config)
    write_safetensors(folder / "cm.safetensors", weights, config=config, step=7, weights_name="ema_0.9")
    write_openai(folder / "cm.pt", weights, model=config.model)
    write_diffusers(folder / "diffusers", weights, config=config, step=7, weights_name="ema_0.9")
    edm = parse_config(TEXT.format(kind="edm", method="sigma_data: 0.5", data=folder / "data", samples=12))
    write_safetensors(folder / "edm.safetensors", weights_of(edm), config=edm, step=7, weights_name="ema_0.9")
    conditional = parse_config(run.config.read_text(), ["model.num_classes=3"])
    write_safetensors(
        folder / "conditional.safetensors", weights_of(conditional), config=conditional, step=7, weights_name="ema_0.9"
    )
    write_trained_run(folder / "other_run", data=folder / "data", kind="edm", method="sigma_data: 0.5")
    write_run(folder / "folder_of_runs" / "one")
    write_run(folder / "shown")
    write_run(folder / "shown_too", kind="edm")
    source = np.random.default_rng(0)
    for name in ("noise.npy", "other_noise.npy"):
        np.save(folder / name, source.standard_normal((2, 3, 8, 8)).astype(np.float32))
    np.savez(folder / "samples.npz", arr_0=source.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "features.pth").write_bytes(b"PK\x03\x04")
    (folder / "launch.yaml").write_text(CONFIG.format(data=dataset(folder / "launch_data")))
    return folder


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    """Weights of a network that is no identity: the layers that start at zero are filled."""
    source = torch.Generator().manual_seed(1)
    state = build_unet(config.model, seed=3).state_dict()
    return {name: torch.randn(v.shape, generator=source) * 0.05 if not v.any() else v for name, v in state.items()}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been launched on this machine, in words."""
    jobs: list[str] = []

    class Recorder(LocalMachine):
        def run(self, job: JobSpec, *, wait: bool) -> int:
            settings = job.run.config.read_text() if job.run.config.exists() else ""
            jobs.append(f"{job.arguments} {job.placement} {job.run} {job.evaluations} {settings}")
            return 0

    monkeypatch.setitem(CLUSTERS, "local", Recorder())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return jobs


def test_no_command_and_no_option_is_left_out() -> None:
    parsers = {name: script.command_parser() for name, script in SCRIPTS.items()}
    for name, parser in parsers.items():
        declared = {action.dest for action in parser._actions} - {"help", "version"}
        assert declared == parser.uses.keys(), f"{name}: added without a Use"
    options = {name: uses.keys() for name, uses in (*COMMANDS.items(), *((n, p.uses) for n, p in parsers.items()))}
    assert options.keys() == VALUES.keys()
    for name in options.keys() - {"search-times"}:
        assert options[name] == VALUES[name].keys(), f"{name}: give a value in VALUES"
        assert not VALUES[name] or any(scene.command == name for scene in SCENES)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.command}-{scene.name.replace(' ', '_')}")
@pytest.mark.long
def test_an_option_has_an_effect_or_is_refused(
    scene: Scene, inputs: Path, launched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cheap(monkeypatch)
    attempts = Attempts(scene, inputs, launched, tmp_path, monkeypatch)
    alone = attempts.outcome()
    assert alone.status == 0, alone.said
    assert attempts.outcome() == alone, "two outcomes of one command line differ: the comparison would show nothing"
    values = {**VALUES[scene.command], **scene.values}
    wrong = []
    for option, words in values.items():
        if words is None:
            continue
        found = attempts.outcome(*words)
        refused = found.status == 2 and not found.files and not found.jobs and found.said.count("\n") == 1
        if option in scene.refused:
            if not refused:
                wrong.append(f"{option}: is accepted ({found.status}, {found.said})")
        elif found.status != 0:
            wrong.append(f"{option}: {found.said.strip()}")
        elif option not in AS_ELSEWHERE and found == alone:
            wrong.append(f"{option}: has no effect")
    assert not wrong


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are made once, trajectories have few times, features are a projection, pages are not drawn."""
    networks = cache(build_unet)
    monkeypatch.setattr("cmscale.source.build_unet", networks)
    monkeypatch.setattr(grid, "off_grid_times", lambda method, count: off_grid_times(method, min(count, 4)))
    for module in ("cmscale.evaluation.session", "data_prep.reference"):
        monkeypatch.setattr(f"{module}.build_features", cheap_features_that_know_their_weights)
    monkeypatch.setattr("data_prep.demo.photograph", photograph)
    monkeypatch.setattr("cmscale.report.build_report", lambda run, *, siblings: (run, siblings))
    monkeypatch.setattr("cmscale.training.estimate.forward_flop", lambda config: 1e9 * config.model.num_res_blocks)


def photograph(name: str) -> Image.Image:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (500, 600, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Outcome:
    status: int
    said: str
    files: dict[str, bytes]
    jobs: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Outcome)
        return (self.status, self.said, self.files, self.jobs) == (other.status, other.said, other.files, other.jobs)


class Attempts:
    """Runs the command line of a scene, each time into an empty folder `{out}`."""

    def __init__(
        self, scene: Scene, inputs: Path, launched: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.scene, self.inputs, self.launched, self.folder = scene, inputs, launched, folder
        self.monkeypatch = monkeypatch
        self.number = 0

    def outcome(self, *more: str) -> Outcome:
        out = self.folder / f"attempt-{self.number}"
        self.number += 1
        out.mkdir()
        self.monkeypatch.chdir(out)
        self.monkeypatch.setenv("CMSCALE_CACHE", str(out / ".cache"))
        if self.scene.command == "submit":
            for name in ("launched", "again"):
                (out / name / "logs").mkdir(parents=True)
                (out / name / "config.yaml").write_text(parsed(self.inputs / "launch.yaml"))
        before = files_in(out)
        self.launched.clear()
        words = [word.format(**{"in": self.inputs, "out": out}) for word in (*self.scene.line, *more)]
        output, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(errors):
            status = self.run(words)

        def same(text: str) -> str:
            text = text.replace(str(out), "OUT")
            return re.sub(r'"(seconds|date|time)": ?[^,}]*|took [\d.]+ s|\d{8}-\d{6}-\w+', "", text)

        changed = {name: content for name, content in files_in(out).items() if before.get(name) != content}
        files = {
            name: same(content.decode()).encode() if name.endswith((".json", ".yaml")) else in_order(name, content)
            for name, content in changed.items()
        }
        said = same(output.getvalue()) if status == 0 else same(errors.getvalue())
        return Outcome(status, said, files, tuple(map(same, self.launched)))

    def run(self, words: list[str]) -> int:
        if script := SCRIPTS.get(self.scene.command):
            self.monkeypatch.setattr(sys, "argv", [self.scene.command, *words])
            return guarded(getattr(script, "run", script.main), words)
        return guarded(run_cmscale, [*self.scene.command.split(), *words])


def in_order(name: str, content: bytes) -> bytes:
    """The content of a file; that of safetensors with the keys of its header in order."""
    if not name.endswith(".safetensors"):
        return content
    size = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:size]), sort_keys=True).encode() + content[size:]


def files_in(folder: Path) -> dict[str, bytes]:
    """The visible files below a folder; of a run's folder the config alone."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.name not in ("provenance.json", "events.jsonl", "lock.mdb")
    }


def parsed(file: Path) -> str:
    return dump_config(read_config(file))


def cheap_features_that_know_their_weights(kind: str, *, weights: object = None, **_: object) -> object:
    features = build_cheap_features(kind)
    if weights is not None:
        features.network.matrix = features.network.matrix * 2
    return replace(features, weights_sha256=sha256(str(weights).encode()).hexdigest())
