"""Config files of anybody: every value is read as YAML 1.2 says, and what can't be read is one line."""

import itertools

import pytest

from cmscale.config import dump_config, parse_config, read_config
from cmscale.errors import UserError

TEXT = """
method: {kind: ct}
model: {image_size: 32, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [("100", 100), ("0o100", 64), ("0x10", 16), ("600_000", 600000), ("+7", 7), ("0", 0)],
)
def test_whole_numbers_are_decimal_unless_they_say_otherwise(text: str, value: int) -> None:
    assert parse_config(TEXT, [f"train.seed={text}"]).train.seed == value


@pytest.mark.parametrize(
    "text", ["0100", "007", "1:00", "1:30", "12:30:45", "2024-01-01", "2024-13-45", "yes", "1e", "0b11", "_1"]
)
def test_what_is_no_number_is_text(text: str) -> None:
    assert parse_config(TEXT, [f"wandb.project={text}"]).wandb.project == text
    with pytest.raises(UserError, match=r"train\.seed: got '.*'; it should be a whole number"):
        parse_config(TEXT, [f"train.seed={text}"])


@pytest.mark.parametrize(
    "text",
    ["0o10", "010", "1e5", "1:30", "2024-01-01", "on", "null", "~", "0x10", "1_0", ".5", "true", "=", "<<", "a: b"],
)
def test_text_that_looks_like_a_number_survives_a_dump(text: str) -> None:
    config = parse_config(TEXT.replace("data:", f"wandb: {{project: {text!r}}}\ndata:"))
    assert parse_config(dump_config(config)).wandb.project == text


@pytest.mark.parametrize(
    "value",
    [
        "!!int abc",
        "!!float x",
        "!!timestamp x",
        "!!binary '*'",
        "!!python/name:os.system",
        "9" * 5000,
        "0x" + "f" * 5000,
    ]
    + ["1" + "0" * 30, "[" * 1100, "*missing", "&a [*a]", "{[a]: 1}", "<<: [1]", "\x00", "1e400", "!!set {1}", "'"],
)
def test_a_value_that_can_not_be_read_is_one_line(value: str) -> None:
    for given in ((TEXT + f"evaluate: {{num_samples: {value}}}", []), (TEXT, [f"evaluate.num_samples={value}"])):
        with pytest.raises(UserError) as caught:
            parse_config(*given)
        assert len(str(caught.value)) <= 1600
        assert "\n" not in str(caught.value)


def test_aliases_that_multiply_are_not_written_out() -> None:
    pairs = itertools.pairwise("abcdefghijk")
    levels = "".join(f"  {name}: &{name} [*{old}, *{old}, *{old}, *{old}]\n" for old, name in pairs)
    with pytest.raises(UserError) as caught:
        parse_config(f"{TEXT}slurm:\n  a: &a [1]\n{levels}evaluate: {{num_samples: *k}}\n")
    assert all(len(line) <= 1600 for line in caught.value.args)


def test_what_is_no_config_file_is_one_line(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.yaml").write_bytes("method: {kind: ct} # naïve".encode("latin-1"))
    (tmp_path / "large.yaml").write_text("#" * (2 << 20))
    (tmp_path / "dead.yaml").symlink_to("gone.yaml")
    for path, line in (
        ("/dev/zero", "has more than 1 MiB, too much for a config"),
        (tmp_path / "folder", "is a folder; give a config file"),
        (tmp_path / "absent.yaml", "no such file"),
        (tmp_path / "dead.yaml", "is a link to gone.yaml, where nothing is"),
        (tmp_path / "latin.yaml", "line 1 is not in UTF-8; save the file in UTF-8"),
        (tmp_path / "large.yaml", "has more than 1 MiB"),
        ("a\0b", "can't be read"),
    ):
        with pytest.raises(UserError, match=line):
            read_config(path)
    (tmp_path / "bom.yaml").write_text("\ufeff" + TEXT)
    assert read_config(tmp_path / "bom.yaml").train.seed == 0
