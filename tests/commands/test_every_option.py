"""Every option of every command has an effect, or giving it is refused before anything is computed.

A scene is a command line and what is special there: a kind of SOURCE, a task, a cluster. In every scene every option
of the command is given once, at a value that is not its default. Then either the outcome (files, output, or the job
that is submitted) differs from that of the command line alone, or the command ends with status 2 and writes nothing.
An option for which `VALUES` has no value fails the test: whoever adds an option adds a value here.
"""

import io
import itertools
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import TEXT, build_cheap_features, write_checkpoint, write_dataset, write_trained_run
from launch_fixtures import CONFIG, dataset
from option_scenes import AS_ELSEWHERE, SCENES, VALUES, Scene
from PIL import Image
from run_folder import write_run

from cmscale.cli.app import run as run_cmscale
from cmscale.cli.command import COMMANDS
from cmscale.cli.finding import Finding
from cmscale.commands.ending import guarded
from cmscale.config import Config, dump_config, parse_config, read_config
from cmscale.config.methods import CT
from cmscale.config.methods.base import SecondTime
from cmscale.consistency import grid
from cmscale.consistency.grid import off_grid_times
from cmscale.interop import write_diffusers, write_openai, write_safetensors
from cmscale.model.unet import build_unet
from cmscale.runs.log import write_event
from data_prep import demo, prepare, reference, verify
from launchers import evaluate, sample, submit, worker
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.jobs import JobSpec

SCRIPTS = {"submit": submit, "evaluate-job": evaluate, "sample-job": sample, "prepare": prepare, "verify-set": verify}
SCRIPTS |= {"reference": reference, "demo": demo, "worker": worker}


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
    ended = write_trained_run(folder / "ended_run", data=folder / "data")
    write_event(ended, "finished", step=3, rank=0)
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
    branched = write_trained_run(folder / "branched", data=folder / "data")
    write_checkpoint(branched, parse_config(branched.config.read_text()), step=3)
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
    for name, declared in options.items():
        assert declared == VALUES[name].keys(), f"{name}: give a value in VALUES"
        is_walked = any(scene.command == name for scene in SCENES)
        assert is_walked or not any(VALUES[name].values()), f"{name}: is in no scene"


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


@pytest.mark.parametrize("command", [name for name, values in VALUES.items() if any(values.values())])
def test_an_option_that_is_given_twice_is_refused(
    command: str, inputs: Path, launched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = next(scene for scene in SCENES if scene.command == command)
    attempts, wrong = Attempts(scene, inputs, launched, tmp_path, monkeypatch), []
    for option, words in VALUES[command].items():
        if words is None or not words[0].startswith("--") or option == "beside":
            continue
        found = attempts.outcome(*words[:2], *words[:2])
        if (
            found.status != 2
            or ": given twice" not in found.said
            or found.said.count("\n") != 1
            or found.files
            or found.jobs
        ):
            wrong.append(f"{option}: {found.status}, {found.said.strip()}")
    assert not wrong


def without(line: tuple[str, ...], more: tuple[str, ...]) -> list[str]:
    """The words of a line without the options that are given in `more`, too."""
    kept, skips = [], False
    flags = {flag.replace("--no-", "--") for flag in more if flag.startswith("--")}
    with_value = {flag for flag, value in itertools.pairwise((*more, "--")) if not value.startswith("--")}
    for word in line:
        if skips:
            skips = False
        elif word.startswith("--") and word.replace("--no-", "--") in flags:
            skips = word in with_value
        else:
            kept.append(word)
    return kept


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are made once, grids have few times, features are a projection, pages are not drawn."""
    networks = cache(build_unet)
    monkeypatch.setattr("cmscale.source.source.build_unet", networks)
    monkeypatch.setattr(grid, "off_grid_times", lambda method, count: off_grid_times(method, min(count, 4)))
    monkeypatch.setattr(CT, "second_time", SecondTime(index=2, last=4))
    for module in ("cmscale.evaluation.session", "cmscale.evaluation.features.extractor"):
        monkeypatch.setattr(f"{module}.build_features", cheap_features_that_know_their_weights)
    monkeypatch.setattr("data_prep.demo.photograph", photograph)
    blocks = "cmscale.training.estimate.counts"
    monkeypatch.setattr(f"{blocks}.image_flop", lambda config, **more: 1e12 * config.model.num_res_blocks)
    monkeypatch.setattr(f"{blocks}.micro_batch_peak", lambda config, **more: 1e9 * more["size"])
    monkeypatch.setattr("cmscale.cli.diagnosis.findings", lambda folder, **more: [Finding("runs", "ok", str(folder))])
    monkeypatch.setattr("cmscale.report.build_report", lambda run, *, siblings: (run, siblings))
    monkeypatch.setattr("cmscale.report.serve.serve", lambda run, **where: print(run, where))


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
        words = [word.format(**{"in": self.inputs, "out": out}) for word in (*without(self.scene.line, more), *more)]
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
