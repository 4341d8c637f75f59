"""Tests of whole runs: golden losses, exact resumption, the same samples on any number of ranks."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ranks import RankFailed, run_ranks, start_ranks, wait

from cmscale.config import dump_config, parse_config
from cmscale.engine.checkpoint_reader import list_checkpoints
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import CHECKPOINT_MANIFEST, RunDir
from cmscale.runs.log import latest_metrics, read_lines
from cmscale.runs.manifests import read_checkpoint_manifest
from cmscale.runs.starts import read_starts
from cmscale.source import load_source

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from data_fixtures import encoded_images, write_lmdb

from data_prep.prepare import main as prepare

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"  # recorded again if RECORD_GOLDEN is set
STEPS = 8
CONFIG = """
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_resolutions: [4],
        head_channels: 32, dropout: 0.1}
data: {path: DATA, num_canonical_nodes: 2, workers: 0}
optimizer: {learning_rate: 1e-3}
ema: {rates: [0.9, 0.5]}
engine: {device: cpu}
train: {total_steps: 8, global_batch_size: 8, micro_batch_size: 2, log_every: 1, sample_every: 4, sample_count: 4}
checkpoint: {every_steps: 3, keep_last: 10}
wandb: {mode: off}
method: METHOD
"""
METHODS = {  # by the generator of the first releases, where the name does not say another one
    "edm": "{kind: edm, sampler_steps: 3}",
    "cd": "{kind: cd, teacher: TEACHER, distance: l1, num_scales: 5}",
    "ct": "{kind: ct, distance: l2, s1: 6}",
    "ct_philox": "{kind: ct, distance: l2, s1: 6}",
    "ict": "{kind: ict, s0: 2, s1: 4}",
    "ect": "{kind: ect, teacher: TEACHER, num_stages: 4}",
    "sct": "{kind: sct, tangent_warmup_steps: 4}",
    "scd": "{kind: scd, teacher: TEACHER, tangent_warmup_steps: 4, tangent: jvp}",
    "scd_differences": "{kind: scd, teacher: TEACHER, tangent_warmup_steps: 4}",
    "pd": "{kind: pd, teacher: TEACHER, start_scales: 4}",
    "tcm": "{kind: tcm, teacher: TEACHER}",
    "mcd": "{kind: mcd, teacher: TEACHER, segments: 2, teacher_steps: 4, final_teacher_steps: 8, annealing_steps: 6, "
    "solver: euler, distance: l2}",
}
NO_CONSISTENCY_FUNCTION = ("edm", "pd", "mcd")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of fifty 8 px images, so that a batch of 8 crosses an epoch's end."""
    folder = tmp_path_factory.mktemp("data")
    source = write_lmdb(folder / "photos_lmdb", encoded_images(50))
    arguments = ["--source", f"lsun:{source}", "--format", "webdataset", "--image-size", "8", "--encoding", "png"]
    assert prepare([*arguments, "--out", str(folder / "set"), "--samples-per-shard", "20"]) == 0
    return folder / "set"


def make_run(root: Path, data: Path, kind: str, *overrides: str, teacher: Path | None = None) -> RunDir:
    method = METHODS[kind].replace("TEACHER", str(teacher))
    probed = [] if kind in NO_CONSISTENCY_FUNCTION else ["train.consistency_error_every=5"]
    averaged = [] if kind == "pd" else ["ema.lengths=[0.1]", "ema.snapshot_every=3"]
    drawn = f"train.random_numbers={'philox' if kind.endswith('philox') else 'torch'}"
    given = [f"data.path={data}", *probed, *averaged, drawn, *overrides]
    config = parse_config(CONFIG.replace("METHOD", method), given)
    root.mkdir(parents=True)
    run = RunDir(root)
    run.config.write_text(dump_config(config))
    run.provenance.write_text('{"starts": [{"host": "one"}, {"host": "two"}]}')
    return run


class Uninterrupted(dict[str, RunDir]):
    """Uninterrupted runs by method on two ranks, each trained when it is first needed."""

    def __init__(self, root: Path, data: Path) -> None:
        super().__init__()
        self.root, self.data = root, data

    def __missing__(self, kind: str) -> RunDir:
        teacher = self["ect" if kind == "tcm" else "edm"].root if "TEACHER" in METHODS[kind] else None
        self[kind] = make_run(self.root / kind, self.data, kind, teacher=teacher)
        assert outcomes(run_ranks(2, "train_work:to_the_end", str(self.root / kind))) == ["finished"] * 2
        return self[kind]


@pytest.fixture(scope="module")
def golden(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("golden"), data)


def outcomes(outputs: list[str]) -> list[str]:
    """The last line of each rank's output, which names how it ended."""
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def losses(run: RunDir) -> list[float]:
    metrics = latest_metrics(run)
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    return [record["loss"] for record in metrics]


def last_weights(run: RunDir) -> dict[str, bytes]:
    """The rank files of the last checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(run.checkpoint(STEPS).glob("rank-*"))}


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_gives_the_recorded_losses(golden: Uninterrupted, kind: str) -> None:
    if "RECORD_GOLDEN" in os.environ:
        recorded = json.loads(GOLDEN.read_text()) | {kind: losses(golden[kind])}
        GOLDEN.write_text(json.dumps({name: recorded[name] for name in METHODS if name in recorded}, indent=1) + "\n")
    assert losses(golden[kind]) == pytest.approx(json.loads(GOLDEN.read_text())[kind], rel=2e-5)
    assert golden[kind].sample_grid(STEPS).is_file()
    load_source(str(golden[kind].root)).denoiser(torch.device("cpu"))  # exactly the UNet's weights, for every method
    events = list(read_lines(golden[kind].events))
    assert events[-1]["event"] == "finished"
    (start,) = (event for event in events if event["event"] == "start")  # sCM begins with a caution
    assert start["attention"].startswith("sdpa: ")
    assert read_starts(golden[kind]) == [{"host": "one"}, {"host": "two", "attention": start["attention"]}]
    measured = {record["step"]: record.get("consistency_error") for record in latest_metrics(golden[kind])}
    snapshots = [listed.step for listed in list_checkpoints(golden[kind].root, within="snapshots")]
    assert snapshots == ([] if kind == "pd" else [3, 6, STEPS])
    probed = [] if kind in NO_CONSISTENCY_FUNCTION else [5, STEPS]
    assert [step for step, error in measured.items() if error is not None and 0 < error < 1] == probed


@pytest.mark.slow
def test_channels_last_activations_change_recorded_losses_by_rounding_alone(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data, "ct", "model.memory_format=channels_last")
    assert outcomes(run_ranks(2, "train_work:to_the_end", str(run.root))) == ["finished"] * 2
    assert losses(run) == pytest.approx(json.loads(GOLDEN.read_text())["ct"], rel=2e-5)
    load_source(str(run.root)).denoiser(torch.device("cpu"))


def written_before_random_numbers(run: RunDir) -> None:
    """Makes a run what a release without the key `train.random_numbers` left."""
    tree = yaml.safe_load(run.config.read_text())
    assert tree["train"].pop("random_numbers") == "torch"
    run.config.write_text(yaml.safe_dump(tree))
    for step in committed_steps(run):
        path = run.checkpoint(step) / CHECKPOINT_MANIFEST
        manifest = read_checkpoint_manifest(path.read_bytes(), origin=str(path))
        del manifest.config["train"]["random_numbers"], manifest.trajectory["train.random_numbers"]
        path.write_bytes(manifest.to_bytes())


@pytest.mark.parametrize(
    ("kind", "number", "outcome"),
    [
        ("ct_philox", signal.SIGTERM, "preempted"),
        ("cd", signal.SIGKILL, None),
        ("scd", signal.SIGTERM, "preempted"),
        ("pd", signal.SIGKILL, None),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one_bit_for_bit(
    golden: Uninterrupted, data: Path, tmp_path: Path, kind: str, number: int, outcome: str | None
) -> None:
    run = make_run(tmp_path / "run", data, kind, teacher=golden["edm"].root)
    ranks = start_ranks(2, "train_work:until_signalled", str(run.root), 4, int(number))
    failed = wait(ranks, timeout=200)
    if outcome is None:
        assert failed, "the killed rank ended well"
    else:
        assert outcomes([rank.output() for rank in ranks]) == [outcome] * 2, ranks[0].errors()[-2000:]
        stopped = [record for record in read_lines(run.events) if record["event"] == "preempted"]
        assert (stopped[0]["why"], run.checkpoint(stopped[0]["step"]).exists()) == ("SIGTERM", True)
    if kind == "cd":
        written_before_random_numbers(run)
    assert outcomes(run_ranks(2, "train_work:to_the_end", str(run.root))) == ["finished"] * 2
    assert losses(run) == losses(golden[kind])
    assert last_weights(run) == last_weights(golden[kind])


def test_another_world_and_stage_sees_the_same_samples_with_the_same_noise(
    golden: Uninterrupted, data: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", data, "ct_philox", "engine.zero_stage=0", "train.micro_batch_size=8")
    assert outcomes(run_ranks(1, "train_work:to_the_end", str(run.root))) == ["finished"]
    assert losses(run) == pytest.approx(losses(golden["ct_philox"]), rel=2e-5)


def test_a_run_whose_teacher_was_replaced_is_not_resumed(golden: Uninterrupted, data: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(golden["edm"].root, teacher)
    run = make_run(tmp_path / "run", data, "cd", "train.total_steps=3", teacher=teacher)
    assert outcomes(run_ranks(1, "train_work:to_the_end", str(run.root))) == ["finished"]
    assert outcomes(run_ranks(1, "train_work:to_the_end", str(run.root))) == ["finished"]  # the same teacher
    shutil.rmtree(RunDir(teacher).checkpoint(STEPS))  # now its newest checkpoint has other weights
    with pytest.raises(RankFailed, match=rf"UserError: method.teacher: the weights of {teacher} have changed"):
        run_ranks(1, "train_work:to_the_end", str(run.root))
