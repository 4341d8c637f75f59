"""Branches: what may differ from the parent, what is copied, and what is left where a branch is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_fixtures import TEXT, write_checkpoint, write_snapshot
from launch_fixtures import dataset
from safetensors.torch import load_file

from cmscale.config import Config, dump_config, parse_config, read_config, trajectory
from cmscale.engine.checkpoint_reader import verify_checkpoint
from cmscale.errors import UserError
from cmscale.io.local import LocalStorage
from cmscale.io.slurm import Refused
from cmscale.io.storage import open_storage
from cmscale.runs.checkpoints import committed_steps, read_manifest
from cmscale.runs.folder import RunDir, rank_file
from cmscale.runs.lineage import read_lineage
from cmscale.runs.manifests import read_dataset_manifest
from launchers import submit
from launchers.branch import new_averages
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.jobs import JobSpec


class Idle(LocalMachine):
    """Starts nothing; refuses the job if `refuses` is set."""

    refuses = False

    def run(self, job: JobSpec, *, wait: bool) -> int:
        del wait
        if self.refuses:
            raise Refused("sbatch: error: invalid account")
        job.taken()
        return 0


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> Idle:
    idle = Idle()
    monkeypatch.setitem(CLUSTERS, "local", idle)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return idle


@pytest.fixture
def parent(tmp_path: Path) -> RunDir:
    """A run of CT with checkpoints of steps 3 and 7."""
    return write_parent(tmp_path / "runs" / "parent", dataset(tmp_path / "data"))


def write_parent(root: Path, data: Path, kind: str = "ct", method: str = "distance: l2", *overrides: str) -> RunDir:
    run = RunDir(root)
    config = parse_config(TEXT.format(kind=kind, method=method, data=data, samples=10), list(overrides))
    fingerprint = read_dataset_manifest(open_storage(data)).fingerprint
    scalars = {"optimizer_step": 7.0, "cur_scale": 8.0, "cur_iter": 7.0, "last_overflow_iter": -1.0}
    for step in (3, 7):
        write_checkpoint(run, config, step=step, data_fingerprint=fingerprint, scalars=scalars)
    run.config.write_text(dump_config(config))
    return run


def branch(parent: RunDir, *words: str, name: str = "new", at: str = "") -> RunDir:
    runs = parent.root.parent
    line = ["--cluster", "local", "--runs-dir", str(runs), "--name", name, "--branch", f"{parent.name}{at}"]
    assert submit.main([*line, *words]) == 0
    return RunDir(runs / name)


def test_a_branch_holds_a_copy_of_the_newest_checkpoint_under_its_own_config(parent: RunDir) -> None:
    new = branch(parent, "optimizer.learning_rate=1e-3", "train.global_batch_size=16", "data.flip=false")
    assert committed_steps(new) == [7]
    before, own = (read_manifest(LocalStorage(run.checkpoint(7))) for run in (parent, new))
    assert own.parts == before.parts
    assert (own.state, own.quantities, own.scalars) == (before.state, before.quantities, before.scalars)
    config = read_config(new.config, resolved=True)
    assert (own.trajectory, own.config_fingerprint) == (trajectory(config), config.fingerprint())
    assert own.config == config.model_dump(mode="json")
    lineage = read_lineage(new)
    assert lineage is not None
    assert (lineage.parent, lineage.step, lineage.generation) == (str(parent.root), 7, 1)
    assert lineage.changed.keys() == {"optimizer.learning_rate", "train.global_batch_size", "data.flip"}
    assert sorted(path.name for path in new.root.iterdir()) == [
        "checkpoints",
        "code",
        "config.yaml",
        "logs",
        "placement.json",
        "provenance.json",
    ]


def test_a_branch_gets_the_snapshots_of_averages_up_to_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("ema.lengths=[0.05,0.1]", "ema.snapshot_every=1", "checkpoint.every_steps=1")
    parent = write_parent(tmp_path / "runs" / "parent", dataset(tmp_path / "data"), "ct", "distance: l2", *overrides)
    config = read_config(parent.config, resolved=True)
    for step in (1, 2, 3, 7):
        write_snapshot(parent, config, step=step)
    (parent.snapshot(2) / rank_file(0, 1)).write_bytes(b"damaged")
    new = branch(parent, "ema.lengths=[0.1]", at="@3")
    assert committed_steps(new, within="snapshots") == [1, 3]
    assert "note: the snapshot of step 2 of parent@3 is not taken" in capsys.readouterr().err
    for step in (1, 3):
        assert verify_checkpoint(new.snapshot(step)) == []
        for name in (rank_file(0, 1), "manifest.json"):
            assert (new.snapshot(step) / name).read_bytes() == (parent.snapshot(step) / name).read_bytes()
    other = branch(parent, "ema.lengths=[]", "ema.snapshot_every=0", name="other", at="@3")
    assert not other.snapshots.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.channels=64"], "model.channels: 32 -> 64: a branch goes on with its parent's network"),
        (["model.qkv_layout=heads_three_dim"], "model.qkv_layout: three_heads_dim -> heads_three_dim: a branch"),
        (["method.kind=edm"], "method.kind: ct -> edm: a branch goes on with its parent's"),
        (["method.sigma_data=0.25"], "method.sigma_data: 0.5 -> 0.25: a branch"),
        (["method.sigma_min=0.01"], "method.sigma_min: 0.002 -> 0.01: a branch"),
        (["train.init_from=there"], "train.init_from: has no effect beside --branch"),
        (["train.total_steps=7"], "step 7 is the end with train.total_steps 7"),
        (["ema.lengths=[0.05]"], "ema.lengths: 0.05 is not among its parent's []"),
        (["DATA2"], "DATA2: has no effect beside --branch"),
        (["--resume", "parent"], "--branch: has no effect beside --resume"),
        (["--fresh"], "--fresh: has no effect without --resume"),
    ],
)
def test_what_a_branch_must_share_with_its_parent_is_refused_in_one_line(
    parent: RunDir, words: list[str], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        branch(parent, *words)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [path.name for path in parent.root.parent.iterdir()] == ["parent"]


def test_everything_else_may_differ(parent: RunDir) -> None:
    free = {
        "optimizer.kind": "adam",
        "optimizer.weight_decay": 0.1,
        "train.seed": 3,
        "train.total_steps": 200,
        "train.random_numbers": "torch",
        "method.s1": 20,
        "method.distance": "l1",
        "method.sigma_max": 40.0,
        "model.dropout": 0.2,
        "model.precision_layout": "uniform",
        "engine.gradient_clip": 1.0,
        "data.shuffle_block": 8,
    }
    new = branch(parent, *(f"{key}={value}" for key, value in free.items()))
    lineage = read_lineage(new)
    assert lineage is not None
    assert {key: new for key, (_, new) in lineage.changed.items()} == free | {"method.schedule_steps": 100}


def test_an_older_step_is_chosen_by_its_number_and_must_exist(parent: RunDir) -> None:
    assert committed_steps(branch(parent, at="@3")) == [3]
    for at, said in (("@5", "choose from 3, 7"), ("@x", "no run there"), ("@latest", None)):
        if said is None:
            assert committed_steps(branch(parent, at=at, name="latest")) == [7]
            continue
        with pytest.raises(UserError, match=said):
            branch(parent, at=at, name="other")


def test_a_name_that_is_taken_is_refused_and_kept(parent: RunDir) -> None:
    new = branch(parent)
    before = new.provenance.read_bytes()
    for again in (branch, lambda parent: branch(parent, name="parent")):
        with pytest.raises(UserError, match="exists; continue it with --resume"):
            again(parent)
    assert new.provenance.read_bytes() == before


def damage(run: RunDir, step: int) -> None:
    path = run.checkpoint(step) / rank_file(0, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_or_refused_if_it_was_chosen(
    parent: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(parent, 7)
    with pytest.raises(UserError, match=r"rank-0000-of-0001.*SHA-256 differs\); choose another step"):
        branch(parent, at="@7")
    assert committed_steps(branch(parent)) == [3]
    assert "note: step 7 of parent is not taken" in capsys.readouterr().err
    damage(parent, 3)
    with pytest.raises(UserError, match="none of 2 checkpoints is intact"):
        branch(parent, name="none")
    assert not (parent.root.parent / "none").exists()
    assert not list(parent.root.parent.glob(".*.unfinished"))


def test_what_a_killed_command_left_is_no_run_and_is_made_again(parent: RunDir) -> None:
    left = parent.root.parent / ".new.unfinished" / "checkpoints" / "step-000000007"
    left.mkdir(parents=True)
    (left / "rank-0000-of-0001.safetensors").write_bytes(b"half")
    assert committed_steps(branch(parent)) == [7]
    assert not left.exists()


def test_a_branch_whose_job_is_refused_leaves_no_run_and_no_plan_before_the_line_of_the_mistake(
    parent: RunDir, cluster: Idle, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.refuses = True
    with pytest.raises(Refused):
        branch(parent)
    assert "global batch" not in capsys.readouterr().out
    assert not (parent.root.parent / "new").exists()
    cluster.refuses = False
    assert committed_steps(branch(parent)) == [7]
    assert "global batch" in capsys.readouterr().out


def test_another_data_set_must_be_named(parent: RunDir, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    dataset(tmp_path / "data", count=11)
    with pytest.raises(UserError, match=r"data.path holds another data set than the run was trained on"):
        branch(parent)
    other = dataset(tmp_path / "other", count=12)
    new = branch(parent, f"data.path={other}")
    fingerprint = read_dataset_manifest(open_storage(other)).fingerprint
    assert read_manifest(LocalStorage(new.checkpoint(7))).data_fingerprint == fingerprint


def test_a_new_average_begins_with_the_one_of_nearest_length(parent: RunDir) -> None:
    new = branch(parent, "ema.rates=[0.6,0.9,0.9999]")
    before = load_file(parent.checkpoint(7) / rank_file(0, 1))
    after = load_file(new.checkpoint(7) / rank_file(0, 1))
    manifest = read_manifest(LocalStorage(new.checkpoint(7)))
    assert manifest.quantities == ("master", "ema_0.6", "ema_0.9", "ema_0.9999")
    for name, origin in {
        "master": "master",
        "ema_0.6": "ema_0.5",
        "ema_0.9": "ema_0.9",
        "ema_0.9999": "ema_0.9",
    }.items():
        assert torch.equal(after[name], before[origin])
    lineage = read_lineage(new)
    assert lineage is not None
    assert lineage.averages == {"ema_0.6": "ema_0.5", "ema_0.9999": "ema_0.9"}
    assert new_averages(manifest, read_config(new.config)) == {}


def test_the_loss_scale_starts_anew_with_another_precision(parent: RunDir) -> None:
    kept = read_manifest(LocalStorage(branch(parent).checkpoint(7)))
    assert kept.scalars["cur_scale"] == 8.0
    new = read_manifest(LocalStorage(branch(parent, "engine.precision=bf16", name="bf16").checkpoint(7)))
    assert new.scalars == {"optimizer_step": 7.0}


def test_a_stage_of_pd_must_stay_the_same(parent: RunDir) -> None:
    method = "teacher: t, start_scales: 64"
    pd = write_parent(parent.root.with_name("pd"), Path(read_config(parent.config).data.path), "pd", method)
    config = read_config(pd.config)
    assert isinstance(config, Config)
    with pytest.raises(UserError, match="in its stage of N = 64, and with these values in that of 32"):
        branch(pd, "method.schedule_steps=50")


def test_a_branch_goes_where_its_parent_ran(parent: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    parent.placement.write_text(
        json.dumps({"cluster": "local", "nodes": 1, "gpus_per_node": 4, "partition": None, "minutes": None})
    )
    new = branch(parent, "train.micro_batch_size=1")
    assert json.loads(new.placement.read_text())["gpus_per_node"] == 4
    assert "placement.json of the run" in capsys.readouterr().out


def test_a_run_on_s3_can_be_the_parent(parent: RunDir, s3: str) -> None:
    storage = open_storage(f"{s3}/runs/far")
    for path in sorted(parent.checkpoints.rglob("*")):
        if path.is_file():
            storage.upload(str(path.relative_to(parent.root)), path)
    line = ["--cluster", "local", "--runs-dir", str(parent.root.parent), "--name", "near", "--branch"]
    assert submit.main([*line, f"{s3}/runs/far@3", "optimizer.learning_rate=1e-3"]) == 0
    new = RunDir(parent.root.parent / "near")
    lineage = read_lineage(new)
    assert lineage is not None
    assert (lineage.parent, str(lineage)) == (f"{s3}/runs/far", "far@3")
    assert (
        read_manifest(LocalStorage(new.checkpoint(3))).parts == read_manifest(LocalStorage(parent.checkpoint(3))).parts
    )
    for url, said in ((f"{s3}/runs/nobody", "no run there"), ("s3://nobody-has-this/x", "no bucket")):
        with pytest.raises(UserError, match=said):
            submit.main([*line, url])


def test_first_weights_that_are_gone_are_not_missed_by_what_goes_on(parent: RunDir, tmp_path: Path) -> None:
    text = parent.config.read_text().replace("init_from: null", f"init_from: {tmp_path / 'gone.pt'}")
    parent.config.write_text(text)
    new = branch(parent)
    assert submit.main(["--cluster", "local", "--resume", str(new.root)]) == 0
    with pytest.raises(UserError, match=r"train.init_from: .*gone.pt: no such file"):
        submit.main(["--cluster", "local", "--resume", str(new.root), "--fresh"])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("seed: 0", "seed: 5"), r"^step-000000007 was trained with another config \(train.seed: 0 -> 5\); undo"),
        (("total_steps: 100", "total_steps: 200"), r"200\); undo the change in \S+ \(method.schedule_steps=100 keeps"),
    ],
)
def test_a_run_whose_config_was_edited_is_refused_before_its_job_waits(
    parent: RunDir, edit: tuple[str, str], words: str
) -> None:
    text = parent.config.read_text()
    assert edit[0] in text
    parent.config.write_text(text.replace(*edit))
    with pytest.raises(UserError, match=words):
        submit.main(["--cluster", "local", "--resume", str(parent.root)])
    parent.config.write_text(text)
    assert submit.main(["--cluster", "local", "--resume", str(parent.root)]) == 0
