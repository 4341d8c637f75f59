"""A key of text takes what was written, also where YAML reads it as a number."""

from pathlib import Path

import pytest

from cmscale.config import dump_config, parse_yaml, read_config
from cmscale.config.keys import all_keys
from cmscale.config.yaml_text import dump_yaml
from cmscale.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "demo_cd.yaml"
TEXT_KEYS = [key.name for key in all_keys() if key.allowed in ("text", "text or null")]
WRITTEN = ["1_000", "0x10", "0o17", "1e3", "1.10", "+5", "-0", ".5", ".nan", "7", "2.5", "007", "12:30", "2024-01-01"]


@pytest.mark.parametrize("key", [key for key in TEXT_KEYS if key not in ("evaluate.features", "train.profile_steps")])
def test_a_key_of_text_takes_what_is_written(key: str) -> None:
    section, _, leaf = key.partition(".")
    for text in [*WRITTEN, "on", "no", "2024_01"]:
        config = read_config(CONFIG, ["train.init_from=x", f"{key}={text}"])
        assert getattr(getattr(config, section), leaf) == text
    assert getattr(getattr(read_config(CONFIG, ["train.init_from=x", f"{key}='true'"]), section), leaf) == "true"


@pytest.mark.parametrize("text", [text for text in WRITTEN if text != "12:30"])
def test_a_word_that_is_refused_is_named_as_it_is_written(text: str) -> None:
    for key in ("evaluate.features", "train.profile_steps"):
        with pytest.raises(UserError, match=f"{key}: got '{text.replace('+', '[+]')}'; "):
            read_config(CONFIG, [f"{key}={text}"])


def test_lists_and_other_options_of_slurm_are_as_written() -> None:
    given = ["exclude=[0x10, 1_0]", "srun_args=[1.10]", "extra.hint=1.10", "extra.switches=1_000", "extra.nice=5"]
    config = read_config(CONFIG, [f"slurm.{each}" for each in given])
    assert (config.slurm.exclude, config.slurm.srun_args) == ("0x10,1_0", ("1.10",))
    assert config.slurm.extra == {"hint": "1.10", "switches": "1_000", "nice": 5}


def test_a_list_without_words_is_refused_as_empty() -> None:
    with pytest.raises(UserError, match=r"slurm.exclude: is empty; leave it out, or give a value"):
        read_config(CONFIG, ["slurm.exclude=[]"])


def test_what_is_written_survives_the_file_of_a_run(tmp_path: Path) -> None:
    config = read_config(CONFIG, ["slurm.account=0x10", "slurm.extra.hint=1.10", "wandb.project=1e3"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config(tmp_path / "config.yaml", resolved=True) == config


def test_numbers_that_no_section_has_checked_are_written_as_numbers() -> None:
    numbers = parse_yaml("[0x10, 1e3, 1_000, 1.10]", origin="a")
    assert parse_yaml(dump_yaml(numbers), origin="b") == [16, 1000.0, 1000, 1.1]
