"""Every key of the config is described where it is declared; pages, schema and commands are made from that."""

import json
import os
import socket
import threading
from pathlib import Path

import config_reference
import pytest
from commands import run

from cmscale.config import json_schema, known_keys, parse_config
from cmscale.config.compare import ABSENT, compared
from cmscale.config.keys import all_keys, sections, written
from cmscale.config.yaml_text import parse_yaml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
TEXT = """
method: {kind: ct}
model: {image_size: 32, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""


def test_every_key_says_what_it_does_and_one_that_changes_the_losses_says_where_its_default_comes_from() -> None:
    assert {key.name for key in all_keys()} == set(known_keys())
    for key in all_keys():
        assert key.description.endswith("."), f"{key.name}: describe it where it is declared, in whole sentences"
        if key.changes_losses and not key.is_required:
            assert key.source, f"{key.name}: say where its default comes from (source=)"
    assert all(what.endswith(".") for what in sections().values())


def test_a_unit_in_a_keys_name_is_its_unit() -> None:
    for key in all_keys():
        for ending, unit in (("_seconds", "seconds"), ("_minutes", "minutes"), ("_gb", "GB"), ("_steps", "steps")):
            if key.name.endswith(ending) and "number" in key.allowed:
                assert key.unit == unit or key.name == "method.sampler_steps", key.name


@pytest.mark.parametrize(
    ("name", "kinds", "allowed", "default"),
    [
        ("train.seed", (), "whole number at least 0", 0),
        ("model.dropout", (), "number at least 0 and below 1", 0.0),
        ("engine.precision", (), "fp32, bf16, fp16", "fp32"),
        ("model.channel_multipliers", (), "list of whole numbers above 0", ...),
        ("optimizer.betas", (), "list of 2 numbers at least 0 and below 1", (0.9, 0.999)),
        ("engine.gradient_clip", (), "number above 0 or null", None),
        ("method.s0", ("ct",), "whole number at least 2", 2),
        ("method.s0", ("ict",), "whole number at least 2", 10),
        ("method.sigma_max", (), "number above 0", 80.0),
        ("evaluate.num_samples", (), "whole number at least 2", 50000),
    ],
)
def test_types_bounds_and_defaults_are_those_of_the_declaration(name: str, kinds, allowed: str, default) -> None:
    found = [key for key in all_keys() if key.name == name and key.kinds == kinds]
    assert [(key.allowed, key.default) for key in found] == [(allowed, default)]


def test_a_default_is_written_as_an_override_reads_it() -> None:
    for key in all_keys():
        if not key.is_required:
            value = parse_yaml(written(key.default), origin=key.name)
            assert (tuple(value) if isinstance(value, list) else value) == key.default, key.name


def test_the_reference_page_and_the_schema_are_those_of_the_keys() -> None:
    for path, made in (
        (config_reference.PAGE, config_reference.page()),
        (config_reference.SCHEMA, config_reference.schema()),
    ):
        assert path.read_text() == made, f"{path}: run python ops/config_reference.py"


def test_the_schema_describes_every_key_and_every_config_names_it() -> None:
    schema = json_schema()
    assert schema["$id"].startswith("urn:")
    for section in schema["$defs"].values():
        for name, key in section["properties"].items():
            assert "description" in key or name == "kind", name
    for path in CONFIGS:
        first = path.read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=config.schema.json", path
        assert (path.parent / first.partition("=")[2]).is_file()


def test_every_config_fits_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(json_schema())
    for path in CONFIGS:
        tree = parse_yaml(path.read_text(), origin=str(path))
        assert [error.message for error in checker.iter_errors(tree)] == []
        assert list(checker.iter_errors(tree | {"trian": {}}))
    tree["train"]["seed"] = "one"
    assert list(checker.iter_errors(tree))


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(monkeypatch, "config", *arguments) == 0
    return capsys.readouterr().out


def test_a_key_is_explained_by_any_of_its_names(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in ("train.seed", "seed", "train.seed=5"):
        text = said(monkeypatch, capsys, "explain", name)
        for part in ("train.seed\n", "Seed of weights", "whole number at least 0", "default  0", "changes the losses"):
            assert part in text
    assert "restart.max_restarts" in said(monkeypatch, capsys, "explain", "slurm.max_restarts")
    assert "switches" in said(monkeypatch, capsys, "explain", "slurm.extra.switches")
    both = said(monkeypatch, capsys, "explain", "method.s0")
    assert "method.s0 (ct)" in both
    assert "method.s0 (ict)" in both
    assert "data.cache_gb" in said(monkeypatch, capsys, "explain", "data")
    assert "may change at a resume" in said(monkeypatch, capsys, "explain", "data.workers")
    assert all(name in said(monkeypatch, capsys, "explain") for name in sections())
    (key,) = json.loads(said(monkeypatch, capsys, "explain", "cache_gb", "--json"))
    assert (key["name"], key["unit"], key["default"], key["changes_losses"]) == ("data.cache_gb", "GB", 200.0, False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.sed", "train.sed: no such key or section; did you mean train.seed?"),
        ("trian", "trian: no such key or section; did you mean train?"),
        ("learning_rat", "did you mean optimizer.learning_rate?"),
        ("zzzzzz", "zzzzzz: no such key or section"),
    ],
)
def test_a_misspelt_key_is_one_line_with_what_is_meant(name: str, words: str, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "config", "explain", name) == 2
    assert words in capsys.readouterr().err


def test_differences_come_by_their_effect_on_the_losses() -> None:
    one = parse_config(TEXT)
    other = parse_config(TEXT, ["method.kind=edm", "train.seed=1", "data.workers=2", "train.total_steps=20"])
    found = {each.key: each for each in compared([one, other])}
    assert found["train.seed"].values == (0, 1)
    assert found["method.s0"].values == (2, ABSENT)
    assert found["method.mu0"].changes_losses
    longer = parse_config(TEXT, ["train.total_steps=20"])
    assert [each.changes_losses for each in compared([one, longer])] == [True]  # CT's schedule is longer, too
    fixed = [parse_config(TEXT, ["method.schedule_steps=10", f"train.total_steps={steps}"]) for steps in (10, 20)]
    assert [each.changes_losses for each in compared(fixed)] == [False]
    assert not found["data.workers"].changes_losses
    effects = [each.changes_losses for each in compared([one, other])]
    assert effects == sorted(effects, reverse=True)
    assert compared([one, one]) == []


def test_a_config_file_may_have_any_name_and_may_be_a_pipe(tmp_path, monkeypatch, capsys) -> None:
    for name in ("a.yaml", "a.conf"):
        (tmp_path / name).write_text(TEXT)
    os.mkfifo(tmp_path / "pipe")  # as in `config diff <(git show HEAD:configs/a.yaml) configs/a.yaml`
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(TEXT,))
    writer.start()
    places = [tmp_path / name for name in ("a.yaml", "a.conf", "pipe")]
    assert said(monkeypatch, capsys, "diff", *places) == "no difference\n"
    writer.join()


def test_what_can_not_be_compared_is_said_as_it_is(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    (tmp_path / "folder.yaml").mkdir()
    for name in ("dead.yaml", "dead.safetensors", "dead"):
        (tmp_path / name).symlink_to("gone")
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "socket.yaml"))
    dead = "is a link to gone, where nothing is"
    for name, words in (
        ("dead.yaml", dead),
        ("dead.safetensors", dead),
        ("dead", dead),
        ("folder.yaml", "is a folder; give a file"),
        ("/dev/null", "is empty"),
        ("socket.yaml", "can't be read"),
    ):
        assert run(monkeypatch, "config", "diff", tmp_path / "a.yaml", tmp_path / name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name}: " in line
        assert words in line


def test_files_runs_and_cards_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(TEXT.replace("micro_batch_size: 2", "micro_batch_size: 4"))
    (run_dir / "events.jsonl").write_text("")
    (tmp_path / "card.md").write_text(f"# CT\n\n## Config\n\n```yaml{TEXT.replace('1e-4', '2e-4')}```\n")
    places = [tmp_path / "a.yaml", run_dir, tmp_path / "card.md"]
    found = json.loads(said(monkeypatch, capsys, "diff", *places, "--json"))
    assert {each["key"]: each["values"] for each in found if each["key"].startswith(("opt", "train"))} == {
        "optimizer.learning_rate": [1e-4, 1e-4, 2e-4],
        "train.micro_batch_size": [2, 4, 2],
        "train.random_numbers": ["philox", "torch", "torch"],  # run and card are older than the key
    }
    text = said(monkeypatch, capsys, "diff", *places)
    assert text.index("changes the losses") < text.index("learning_rate") < text.index("does not change the losses")
    assert said(monkeypatch, capsys, "diff", places[0], places[0]) == "no difference\n"
    for arguments, words in (
        (["diff", places[0]], "give two or more"),
        (["diff", places[0], "x"], "no such file or folder"),
    ):
        assert run(monkeypatch, "config", *arguments) == 2
        assert words in capsys.readouterr().err
