"""Keys under their old names: read everywhere, reported once where a user wrote them, refused if given twice."""

import json
from pathlib import Path

import pytest
import yaml

from cmscale.config import Config, dump_config, parse_config, read_config
from cmscale.config import files as config_files
from cmscale.config.renamed import RENAMED, with_current_names
from cmscale.errors import UserError

TEXT = """
method: {kind: ct}
model: {image_size: 32, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""
OLD = TEXT + "slurm: {account: team, max_restarts: 3, backoff_seconds: 4, signal_seconds: 5}\n"


@pytest.fixture(autouse=True)
def nothing_reported_yet() -> None:
    config_files._report_old_keys.cache_clear()


def old_layout(config: Config) -> dict:
    """A config as versions without the section `restart` stored it."""
    tree = json.loads(config.model_dump_json())
    tree["slurm"] |= tree.pop("restart")
    return tree


def test_old_keys_of_a_file_are_read_with_one_line_that_names_the_current_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(OLD)
    config = read_config(file)
    restart = config.restart
    assert (restart.max_restarts, restart.backoff_seconds, restart.signal_seconds) == (3, 4, 5)
    assert config.slurm.account == "team"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"{file}: ")
    for old, new in RENAMED.items():
        assert f"{old} as {new}" in captured.err
    read_config(file)
    assert capsys.readouterr().err == ""  # once per process


def test_current_keys_are_read_silently(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_config(TEXT + "restart: {max_restarts: 3}\n").restart.max_restarts == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["", "slurm: {max_restarts: 3}\n", "restart: {max_restarts: 3}\n"])
@pytest.mark.parametrize("override", ["slurm.max_restarts=7", "restart.max_restarts=7"])
def test_an_override_under_either_name_replaces_the_value_of_the_file(
    file: str, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse_config(TEXT + file, [override]).restart.max_restarts == 7
    reported = capsys.readouterr().err
    assert ("overrides: " in reported) == override.startswith("slurm")


def test_old_and_current_key_together_are_refused_in_one_line() -> None:
    both = TEXT + "slurm: {signal_seconds: 5}\nrestart: {signal_seconds: 6}\n"
    with pytest.raises(UserError, match=r"slurm\.signal_seconds is the old name of restart\.signal_seconds.*remove"):
        parse_config(both)
    with pytest.raises(UserError, match=r"slurm\.signal_seconds is the old name of restart\.signal_seconds.*remove"):
        parse_config(TEXT, ["restart.signal_seconds=6", "slurm.signal_seconds=5"])
    with pytest.raises(ValueError, match=r"slurm\.signal_seconds is the old name"):
        Config.model_validate(yaml.safe_load(both) | {"optimizer": {"learning_rate": 1e-4}})


def test_a_value_out_of_bounds_is_refused_under_the_current_name() -> None:
    with pytest.raises(UserError, match=r"restart\.max_restarts: got -1"):
        parse_config(TEXT, ["slurm.max_restarts=-1"])


def test_configs_in_manifests_of_older_versions_are_read_silently_and_keep_their_fingerprint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = parse_config(TEXT, ["restart.max_restarts=3", "slurm.qos=long"])
    again = Config.model_validate_json(json.dumps(old_layout(config)))
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert parse_config(TEXT).fingerprint() == config.fingerprint()
    assert capsys.readouterr().err == ""


def test_a_stored_config_of_an_older_version_is_written_with_current_keys() -> None:
    config = parse_config(TEXT, ["restart.backoff_seconds=1"])
    assert dump_config(parse_config(yaml.safe_dump(old_layout(config)))) == dump_config(config)


def test_the_tree_that_is_renamed_is_not_changed() -> None:
    tree = {"slurm": {"max_restarts": 3}, "restart": None}
    assert with_current_names(tree) == ({"slurm": {}, "restart": {"max_restarts": 3}}, ["slurm.max_restarts"])
    assert tree == {"slurm": {"max_restarts": 3}, "restart": None}
    for odd in ({"slurm": None}, {"slurm": [1]}, {"slurm": {}}, {}):
        assert with_current_names(odd) == (odd, [])
