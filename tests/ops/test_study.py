"""The study plans all runs alike, does everything once however often it is killed, and shows what it measured."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_folder import write_evaluation
from study import page, pictures, run
from study.commands import Runner
from study.plan import POINTS, Asked, Command, Recipe, Settings, Study, in_order, read_asked, read_recipes
from study.results import Spread, read_results

from cmscale.commands.ending import guarded
from cmscale.config import parse_config
from cmscale.config.agreement import check_teacher, network_settings
from cmscale.errors import UserError
from cmscale.io.image_tensors import grid
from cmscale.io.locks import hold
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, read_lines

SMALL = Settings(images=48, batch=16, pictures=24, samples=8)
SCRIPT = Path(run.__file__)


def study_in(folder: Path) -> Study:
    return Study(folder, SMALL, read_recipes())


def test_all_recipes_train_one_network_on_equal_images_and_follow_models_that_they_may_follow(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    configs = {name: parse_config(study.config_text(recipe, 0)) for name, recipe in study.recipes.items()}
    networks = [network_settings(config) for config in configs.values()]
    assert {"edm", "cd", "ct", "pd", "ict", "ect", "scd", "sct", "tcm", "mcd"} <= configs.keys()
    assert all(network["model.channels"] == networks[0]["model.channels"] for network in networks)
    assert len({config.model for config in configs.values()}) == 1
    assert {(config.train.total_steps, config.train.global_batch_size) for config in configs.values()} == {(3, 16)}
    for name, recipe in study.recipes.items():
        if recipe.after is not None:
            check_teacher(configs[recipe.after], configs[name], origin=recipe.after)
            assert configs[name].method.teacher_choice.source == str(study.run(recipe.after, 0))


def test_every_method_comes_with_one_seed_before_any_comes_with_the_next(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    names = [command.name for command in study.commands(in_order(study.recipes, ["tcm"]), 2)]
    trained = [name for name in names if name.startswith("train")]
    assert trained == [f"train {name}-{seed}" for seed in (0, 1) for name in ("edm", "ect", "tcm")]
    done: set[str] = set()
    for command in study.commands(list(study.recipes), 2):
        assert set(command.needs) <= done, command.name
        done.add(command.name)
    with pytest.raises(UserError, match="--methods vae: no such recipe; choose from cd, "):
        in_order(study.recipes, ["vae"])


def test_a_method_is_measured_in_the_numbers_of_steps_that_it_can_take(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    for name, recipe in study.recipes.items():
        method = parse_config(study.config_text(recipe, 0)).method
        only = method.only_sampling_steps
        assert tuple(recipe.sampling_steps) == ((1, 2) if only is None else (only,)), name
        command = next(each for each in study.commands([name], 1) if each.name == f"evaluate {name}-0")
        assert command.arguments[-2:] == ("--steps", ",".join(map(str, recipe.sampling_steps)))


def test_the_points_end_where_progressive_distillation_has_its_students(tmp_path: Path) -> None:
    settings = Settings(images=1000, batch=32)
    assert settings.steps == 33
    assert settings.points == (0, 11, 22, 33)
    study = Study(tmp_path, settings, read_recipes())
    method = parse_config(study.config_text(study.recipes["pd"], 0)).method
    scales = [method.schedule(step, total_steps=33).num_scales for step in range(33)]
    ends = {settings.points.index(step + 1) for step in range(33) if scales[step] == 2 and scales[step + 1] == 1}
    assert ends == {study.recipes["pd"].last_point[2]}


def test_a_study_that_goes_on_keeps_its_settings(tmp_path: Path) -> None:
    nothing = {"methods": None, "seeds": None}
    first = read_asked(tmp_path, {"images": 96, "batch": None}, {"methods": ["cd"], "seeds": 2})
    assert first == Asked(replace(Settings(), images=96), ["cd"], 2, is_there=False)
    first.write(tmp_path)
    assert read_asked(tmp_path, {"images": None}, nothing) == replace(first, is_there=True)
    assert read_asked(tmp_path, {"images": 96}, {**nothing, "seeds": 3}).seeds == 3
    with pytest.raises(UserError, match=r"--images 48: the study in .* has 96; leave it out, or give another --out"):
        read_asked(tmp_path, {"images": 48}, nothing)


def test_a_recipe_that_changed_since_is_refused(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study.write_config(study.recipes["cd"], 0)
    replace(study, ranks=2).write_config(study.recipes["cd"], 0)  # changes no losses
    other = replace(study.recipes["cd"], config={"method": {**study.recipes["cd"].config["method"], "num_scales": 20}})
    with pytest.raises(UserError, match="recipe cd was another one when this study began"):
        study.write_config(other, 0)


def test_a_run_whose_folder_was_never_finished_begins_anew_and_another_goes_on(tmp_path: Path) -> None:
    study = replace(study_in(tmp_path), ranks=2)
    root = study.run("ct", 0)
    (root / "logs").mkdir(parents=True)  # what a kill leaves of a run that is being made

    def training() -> Command:
        return next(command for command in study.commands(["ct"], 1) if command.name == "train ct-0")

    assert "--name" in training().arguments
    assert training().leftover == root
    (root / "config.yaml").touch()
    assert training().arguments[-3:] == ("--resume", "ct-0", "train.micro_batch_size=8")
    assert training().leftover is None
    command = replace(shell(tmp_path, "made", f"mkdir {tmp_path}/left"), leftover=tmp_path / "left")
    (tmp_path / "left" / "logs").mkdir(parents=True)
    assert Runner(tmp_path).run_all([command], count=1) == []


def test_two_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(tmp_path / ".lock", timeout=0, what="the test"):
        assert guarded(run.main, ["--out", str(tmp_path)]) == 2
    assert "another process holds the lock" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hours", "0"], "got '0'; it should be a number of hours above 0"),
        (["--hours", "1", "--page-only"], "--hours"),
        (["--page-only"], "--page-only: there is no study in "),
        (["--batch", "16", "--ranks", "3"], "--ranks 3: does not divide the batch of 16 images"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(run.main, ["--out", str(tmp_path / "new"), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def shell(folder: Path, name: str, script: str, *, needs: tuple[str, ...] = ()) -> Command:
    """A command that notes its start, runs a script, and leaves a product."""
    product = folder / name
    return Command(name, ("bash", "-c", f"echo {name} >> {folder}/begun; {script}; touch {product}"), product, needs)


def begun(folder: Path) -> list[str]:
    return (folder / "begun").read_text().split()


def test_what_is_done_is_not_done_again_and_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    commands = [
        shell(tmp_path, "first", "true"),
        shell(tmp_path, "second", f"test -e {mended} || exit 3", needs=("first",)),
        shell(tmp_path, "third", "true", needs=("second",)),
        shell(tmp_path, "fourth", "true"),
    ]
    assert Runner(tmp_path).run_all(commands, count=4) == ["second", "third"]
    assert begun(tmp_path) == ["first", "second", "fourth"]
    mended.touch()
    assert Runner(tmp_path).run_all(commands, count=4) == []
    assert begun(tmp_path) == ["first", "second", "fourth", "second", "third"]
    (tmp_path / "fourth").unlink()  # its product is gone
    assert Runner(tmp_path).run_all(commands, count=4) == []
    assert begun(tmp_path)[5:] == ["fourth"]


def test_the_deadline_asks_the_running_command_to_end_and_begins_no_other(tmp_path: Path) -> None:
    saves = f"trap 'echo saved >> {tmp_path}/begun; exit 1' TERM; echo long >> {tmp_path}/begun"
    saves += "; while true; do sleep 0.01; done"
    commands = [Command("long", ("bash", "-c", saves), tmp_path / "long"), shell(tmp_path, "next", "true")]
    runner = Runner(tmp_path)

    def end() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        runner.deadline = time.monotonic()

    threading.Thread(target=end, daemon=True).start()
    assert runner.run_all(commands, count=2) == []
    assert begun(tmp_path) == ["long", "saved"]


PROGRAM = """
import sys
from pathlib import Path
from study.commands import Runner
from study.plan import Command
folder = Path(sys.argv[1])
script = (
    "trap 'sleep 0.5; echo saved >> DIR/begun; exit 1' TERM; echo NAME >> DIR/begun; "
    "while test ! -e DIR/go; do sleep 0.01; done"
)
commands = [Command(name, ("bash", "-c", script.replace("DIR", str(folder)).replace("NAME", name)), folder)
            for name in ("one", "two")]
runner = Runner(folder)
runner.run_all(commands, count=2)
sys.exit(0 if runner.stopped is None else 128 + runner.stopped)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_start_ends_its_command_in_order_and_the_next_start_waits_for_that(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    path = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parents[1])])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    first = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    while not (tmp_path / "begun").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(number)
    assert first.wait() == status
    second = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    while len(begun(tmp_path)) < 3:
        assert second.poll() is None, second.communicate()
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert second.wait() == 0, second.communicate()
    assert begun(tmp_path) == ["one", "saved", "one", "two"]
    assert {line["name"] for line in read_lines(tmp_path / "commands.jsonl") if line["status"] == 0} == {"one", "two"}


def test_pictures_are_whole_and_the_held_out_ones_are_others(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    pictures.main(folder, 9, 5, 24)
    train, held_out = (sorted((folder / name).iterdir()) for name in ("train", "held_out"))
    assert [path.name for path in train] == [f"{number:06d}.png" for number in range(9)]
    assert len(held_out) == 5
    assert len({path.read_bytes() for path in [*train, *held_out]}) == 14
    assert {Image.open(path).size for path in [*train, *held_out]} == {(24, 24)}


def measured(study: Study, recipe: Recipe, seed: int, *, factor: float) -> None:
    """A run's folder with evaluations at every point, a log and a grid of samples."""
    found = RunDir(study.run(recipe.name, seed))
    found.samples.mkdir(parents=True)
    found.config.write_text(study.config_text(recipe, seed))
    heun = recipe.name == "edm"
    for number, step in enumerate(study.settings.points):
        for steps in (1, 2):
            score = factor * (400 - 100 * number) / steps
            nfe = 2 * steps - 1 if heun else steps
            write_evaluation(found, step=step, nfe=nfe, values=(score,), num_samples=study.settings.samples)
    if heun:
        write_evaluation(found, step=3, nfe=19, values=(50.0 * factor,), num_samples=study.settings.samples)
    write_evaluation(found, step=3, nfe=1, values=(1.0,), num_samples=999)  # somebody else's question
    for step, rate in ((1, 1.0), (2, 160.0), (3, 80.0)):
        line = {"step": step, "seconds": 1.0, "images_per_second": rate, "peak_memory_gib": 0.5 * factor}
        append_line(found.metrics, line)
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    grid(pixels).save(found.sample_grid(study.settings.steps))


def test_the_page_has_every_method_with_its_mean_deviation_and_costs(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    for name in ("edm", "cd", "pd"):
        for seed, factor in ((0, 1.0), (1, 1.1)):
            measured(study, study.recipes[name], seed, factor=factor)
            append_line(tmp_path / "commands.jsonl", {"name": f"train {name}-{seed}", "status": 1, "cpu_seconds": 3.0})
            append_line(tmp_path / "commands.jsonl", {"name": f"train {name}-{seed}", "status": 0, "cpu_seconds": 4.0})
    result = read_results(study, list(study.recipes), 3)
    assert [each.recipe.name for each in result.methods] == ["edm", "cd", "pd"]
    assert result.seeds == 2
    assert result.methods[1].curves[2] == {
        16 * step: Spread((200.0 - 50 * number, 1.1 * (200 - 50 * number)))
        for number, step in enumerate(study.settings.points)
    }
    index = page.write_page(study, result)
    table = (index.parent / "table.md").read_text().splitlines()
    assert "| cd | edm | 2 | 105.0 ± 7.1 | 52.5 ± 3.5 | 150 (least 100) | 0.55 | 7 |" in table
    assert "| pd | edm | 2 | 105.0 ± 7.1 | 105.0 ± 7.1 | 150 (least 100) | 0.55 | 7 |" in table  # two steps at 2/3
    assert "| edm, 19 evaluations |  | 2 | 52.5 ± 3.5 |  |  |  |  |" in table
    assert "105.0 ± 7.1" in index.read_text()
    assert {path.name for path in index.parent.iterdir()} == {"index.html", "table.md", "fd.png", "samples.png"}


def test_the_page_of_a_study_that_runs_is_written_beside_it(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    Asked(SMALL, ["ct"], 1, is_there=False).write(tmp_path)
    command = ["--out", str(tmp_path), "--page-only"]
    with hold(tmp_path / ".lock", timeout=0, what="the study"):
        assert guarded(run.main, command) == 0  # nothing is measured yet
        measured(study, study.recipes["ct"], 0, factor=1.0)
        assert guarded(run.main, command) == 0
    assert "| ct |  | 1 | 100.0 | 50.0 |" in (tmp_path / "page" / "table.md").read_text()


def test_tiles_of_a_grid_are_the_samples(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid(pixels).save(tmp_path / "grid.png")
    cut = np.stack([np.asarray(tile) for tile in page.tiles(tmp_path / "grid.png")])
    enlarged = pixels.permute(0, 2, 3, 1).numpy().repeat(page.TILE // 32, axis=1).repeat(page.TILE // 32, axis=2)
    assert np.array_equal(cut, enlarged)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_that_is_killed_while_it_trains_ends_with_the_page_of_an_unkilled_one(tmp_path: Path) -> None:
    given = {"images": SMALL.images, "batch": SMALL.batch, "pictures": SMALL.pictures, "samples": SMALL.samples}
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    command = [sys.executable, str(SCRIPT), *options, "--methods", "cd", "--seeds", "1", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    killed = subprocess.Popen([*command, str(tmp_path / "killed")])
    log = tmp_path / "killed" / "runs" / "cd-0" / "metrics.jsonl"
    while not log.exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    whole, mended = (
        [each.curves for each in read_results(study_in(tmp_path / name), ["edm", "cd"], 1).methods]
        for name in ("whole", "killed")
    )
    assert whole == mended
    assert [[len(curve) for curve in curves.values()] for curves in whole] == 2 * [2 * [POINTS + 1]]
    ends = [line["name"] for line in read_lines(tmp_path / "killed" / "commands.jsonl") if line["status"] == 0]
    assert len(ends) == len(set(ends))
