"""Tests of the checks before a run."""

import contextlib
import types
from pathlib import Path

import pytest
import torch

from cmscale.distributed.world import World
from cmscale.runs.folder import RunDir
from cmscale.training import preflight
from cmscale.training.preflight import PreflightFailed, check


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def look(run: RunDir) -> None:
    check(types.SimpleNamespace(fingerprint=lambda: "0" * 64), run, World())  # pyright: ignore[reportArgumentType]


def test_a_sound_node_passes_and_nothing_is_left_behind(run: RunDir) -> None:
    look(run)
    assert list(run.logs.iterdir()) == []


def test_a_node_whose_storage_takes_no_file_is_named_in_one_line(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    run.root.mkdir()
    run.logs.touch()  # a file where the folder should be
    with pytest.raises(PreflightFailed, match=r"^preflight: node7 \(rank 0\): FileExistsError: .*logs'$"):
        look(run)


def test_a_node_without_memory_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    left = types.SimpleNamespace(available=100 * 2**20)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: left)
    with pytest.raises(PreflightFailed, match=r"MemoryError: only 100 MiB of memory left for 1 ranks"):
        look(run)


def test_a_run_folder_that_is_not_shared_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SEEN_SECONDS", 0.0)
    monkeypatch.setattr(Path, "touch", lambda *_: None)  # a file of rank 0 never becomes visible
    with pytest.raises(PreflightFailed, match=r"use a folder that all nodes share"):
        look(run)


@pytest.mark.parametrize(("free_gib", "refused"), [(19.9, True), (20.0, False)])
def test_a_gpu_of_which_another_process_holds_more_than_three_quarters_is_named(
    free_gib: float, refused: bool, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.torch.cuda, "mem_get_info", lambda _: (int(free_gib * 2**30), 80 * 2**30))
    world = World(device=torch.device("cuda", 0))
    expected = pytest.raises(MemoryError, match=r"^cuda:0 has 19.9 of 80.0 GiB free: another process holds it$")
    with expected if refused else contextlib.nullcontext():
        preflight.check_memory(run, world)
