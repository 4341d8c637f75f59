"""Runs that go on: branches with the same and with other values, and runs continued from their exports on S3."""

import shutil
from pathlib import Path

import pytest
from ranks import RankFailed, run_ranks
from small_runs import events, last_weights, make_data, make_run, outcomes

from cmscale.errors import UserError
from cmscale.io.storage import open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import RunDir
from cmscale.runs.homes import homes
from cmscale.runs.lineage import read_lineage
from cmscale.runs.log import latest_metrics
from cmscale.runs.starts import read_starts
from launchers import submit
from launchers.clusters import CLUSTERS
from launchers.clusters.local import LocalMachine
from launchers.jobs import JobSpec


def train(run: RunDir) -> None:
    assert outcomes(run_ranks(2, "train_work:to_the_end", str(run.root))) == ["finished"] * 2


def losses(run: RunDir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in latest_metrics(run)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parent(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """An uninterrupted run with checkpoints of steps 0, 3, 6 and 9."""
    run = make_run(tmp_path_factory.mktemp("runs") / "parent", data)
    train(run)
    return run


@pytest.fixture(autouse=True)
def only_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher makes the run and does not start its ranks, which a warm process forks."""

    class Idle(LocalMachine):
        def run(self, job: JobSpec, *, wait: bool) -> int:
            del job, wait
            return 0

    monkeypatch.setitem(CLUSTERS, "local", Idle())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def branch(parent: RunDir, name: str, *overrides: str, at: str = "@6") -> RunDir:
    runs = parent.root.parent
    line = ["--cluster", "local", "--gpus-per-node", "2", "--runs-dir", str(runs)]
    assert submit.main([*line, "--branch", f"{parent.root}{at}", "--name", name, *overrides]) == 0
    return RunDir(runs / name)


@pytest.mark.long
def test_a_branch_continues_as_its_parent_would_bit_for_bit_also_when_the_parent_is_gone(
    parent: RunDir, tmp_path: Path
) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(parent.root, copy.root)
    before = {path: path.stat().st_mtime_ns for path in copy.root.rglob("*")}
    same = branch(copy, "same", "train.log_every=1")
    assert {path: path.stat().st_mtime_ns for path in copy.root.rglob("*")} == before
    shutil.rmtree(copy.root)
    train(same)
    assert losses(same) == {step: loss for step, loss in losses(parent).items() if step > 6}
    assert last_weights(same) == last_weights(parent)
    lineage = read_lineage(same)
    assert lineage is not None
    assert (str(lineage), lineage.samples, lineage.generation, lineage.changed) == ("copy@6", 48, 1, {})
    assert [event["why"] for event in events(same, "resumed")] == ["branch of copy@6"]


@pytest.mark.long
def test_a_branch_with_a_lower_rate_and_more_steps_differs_from_there_alone(parent: RunDir) -> None:
    changed = ["optimizer.learning_rate=1e-4", "train.total_steps=12", "ema.rates=[0.9,0.99]"]
    lower = branch(parent, "lower", *changed)
    train(lower)
    found, expected = losses(lower), losses(parent)
    assert list(found) == [7, 8, 9, 10, 11, 12]
    assert found[7] == expected[7]  # of the same weights, before the first step with the new rate
    assert found[8] != expected[8]
    scales = {record["step"]: record["num_scales"] for record in latest_metrics(lower)}
    assert [scales[step] for step in (7, 8, 9)] == [
        record["num_scales"] for record in latest_metrics(parent) if record["step"] > 6
    ]
    lineage = read_lineage(lower)
    assert lineage is not None
    assert dict(lineage.changed) == {
        "ema.rates": ([0.9, 0.5], [0.9, 0.99]),
        "method.schedule_steps": (None, 9),
        "optimizer.learning_rate": (1e-3, 1e-4),
        "train.total_steps": (9, 12),
    }
    assert lineage.averages == {"ema_0.99": "ema_0.9"}


@pytest.mark.long
def test_a_run_continues_from_its_exports_elsewhere_and_comes_back_bit_for_bit(
    parent: RunDir, data: Path, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_length = ["method.schedule_steps=9", f"checkpoint.export_to={s3}/runs"]
    here = make_run(tmp_path / "here" / "one", data, "train.total_steps=3", *own_length)
    train(here)
    url = f"{s3}/runs/one"
    exported = open_storage(url)
    assert committed_steps(exported) == [0, 3]
    line = ["--cluster", "local", "--gpus-per-node", "2", "--resume", url, "--runs-dir"]
    assert submit.main([*line, str(tmp_path / "third")]) == 0
    assert f"run one is finished: step 3 of 3\nrun: {url}\n" in capsys.readouterr().out
    assert not (tmp_path / "third").exists()

    there = RunDir(tmp_path / "there" / "one")
    assert submit.main([*line, str(there.root.parent), "train.total_steps=6"]) == 0
    assert list(losses(there)) == [1, 2, 3]
    assert read_starts(there)[-1]["continued_from"] == {"exports": url, "step": 3}
    train(there)
    assert committed_steps(exported) == [0, 3, 6]
    assert [home.folder for home in homes(exported)] == [str(here.root), str(there.root)]

    here.config.write_text(here.config.read_text().replace("total_steps: 3", "total_steps: 6"))
    with pytest.raises(UserError, match=r"goes on elsewhere, in .*there/one"):
        submit.main(["--cluster", "local", "--resume", str(here.root), "--gpus-per-node", "2"])
    manifest = exported.read("checkpoints/step-000000006/manifest.json")
    with pytest.raises(RankFailed, match=r"NotExported: step .* is not in .*goes on elsewhere"):
        train(here)
    assert exported.read("checkpoints/step-000000006/manifest.json") == manifest

    with pytest.raises(UserError, match=r"has a checkpoint of step 6, but the run went on from step 3 in .*there/one"):
        submit.main([*line, str(here.root.parent), "train.total_steps=9"])
    shutil.rmtree(here.checkpoint(6))
    assert submit.main([*line, str(here.root.parent), "train.total_steps=9"]) == 0
    train(here)
    assert losses(here) == losses(parent)
    assert last_weights(here) == last_weights(parent)
    assert committed_steps(exported) == [0, 3, 6, 9]
