"""`cmscale ema`: averages by a power function of any length, from a run that keeps some."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run as run_command
from evaluation_fixtures import write_checkpoint, write_dataset, write_trained_run

from cmscale.config import parse_config
from cmscale.engine.checkpoint_reader import by_name, read_manifest
from cmscale.engine.power_averages import reconstructed
from cmscale.io.local import LocalStorage
from cmscale.source import load_source


def test_verify_checks_snapshots_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    data = write_dataset(tmp_path / "made", count=8)
    run = write_trained_run(tmp_path / "run", data=data, overrides=("ema.lengths=[0.05,0.1]",))
    shutil.copytree(run.checkpoint(7), run.snapshot(7))
    capsys.readouterr()
    assert run_command(monkeypatch, "verify", run.root) == 0
    assert capsys.readouterr().out.splitlines() == ["step-000000007: good", "snapshots/step-000000007: good"]
    (path,) = run.snapshot(7).glob("rank-*")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert run_command(monkeypatch, "verify", run.root) == 1
    assert "snapshots/step-000000007: " in capsys.readouterr().out


@pytest.mark.parametrize("form", ["model.safetensors", "folder", "diffusers"])
def test_verify_compares_the_hash_of_exported_weights(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = write_trained_run(tmp_path / "run", data=write_dataset(tmp_path / "made", count=8))
    out = tmp_path / form
    kind = "diffusers" if form == "diffusers" else "safetensors"
    assert run_command(monkeypatch, "export", run.root, "--format", kind, "--to", out) == 0
    capsys.readouterr()
    assert run_command(monkeypatch, "verify", out) == 0
    assert capsys.readouterr().out == f"{out}: good\n"
    (path,) = out.rglob("*.safetensors") if out.is_dir() else [out]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7e")
    assert run_command(monkeypatch, "verify", out) == 1
    assert "damaged: holds other bytes than were exported" in capsys.readouterr().out
    assert run_command(monkeypatch, "verify", out, "--json") == 1
    (problems,) = json.loads(capsys.readouterr().out).values()
    assert len(problems) == 1


def test_verify_refuses_weights_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = write_trained_run(tmp_path / "run", data=write_dataset(tmp_path / "made", count=8))
    assert run_command(monkeypatch, "export", run.root, "--format", "openai", "--to", tmp_path / "x.pt") == 0
    capsys.readouterr()
    assert run_command(monkeypatch, "verify", tmp_path / "x.pt") == 2
    assert "x.pt: holds no checkpoint; give a run, a checkpoint folder or weights with" in capsys.readouterr().err


def test_an_average_of_another_length_is_written_into_the_run_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    data = write_dataset(tmp_path / "made", count=8)
    run = write_trained_run(tmp_path / "run", data=data, overrides=("ema.lengths=[0.05,0.1]",))
    write_checkpoint(run, parse_config(run.config.read_text()), step=3)
    capsys.readouterr()
    assert run_command(monkeypatch, "ema", run.root) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[:4] == [f"step {step}: power_{length}" for step in (3, 7) for length in (0.05, 0.1)]
    assert "power_0.05 at step 7: error 0.00%" in listed
    assert run_command(monkeypatch, "ema", run.root, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["kept"][0], len(told["errors"])) == (7, {"step": 3, "name": "power_0.05"}, 7)
    assert run_command(monkeypatch, "ema", run.root, "--length", 0.07) == 0
    written = run.root / "exports" / "step-000000007-power_0.07.safetensors"
    assert capsys.readouterr().out == f"{written}\n"
    found = load_source(str(written))
    assert (found.weights_name, found.step) == ("power_0.07", 7)
    manifest = read_manifest(LocalStorage(run.checkpoint(7)))
    expected = by_name(reconstructed(str(run.root), 0.07, step=7), manifest.parameters)
    assert all(torch.equal(value, found.weights[name]) for name, value in expected.items())
    assert run_command(monkeypatch, "ema", run.root, "--length", 0.01) == 2
    assert "give it with an error of" in capsys.readouterr().err
