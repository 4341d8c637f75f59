"""Tests of the config: strict parsing, one-line errors, no unread key, and the fingerprint."""

import shutil
from pathlib import Path

import pytest
from config_reads import unread_leaves
from hypothesis import given
from hypothesis import strategies as st

from cmscale.config import (
    accumulation_steps,
    differences,
    dump_config,
    json_schema,
    known_keys,
    leaves,
    parse_config,
    read_config,
    trajectory,
)
from cmscale.errors import UserError

ROOT = Path(__file__).parents[2]
TEXT = """
method: {kind: ct}
model: {image_size: 32, channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1}
data: {path: s3://bucket/data}
optimizer: {learning_rate: 1e-4}
train: {total_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""


def test_a_dumped_config_is_the_same_config() -> None:
    config = parse_config(TEXT)
    again = parse_config(dump_config(config))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.sed=1", ["train.sed", "did you mean train.seed"]),
        ("train.seed=-1", ["train.seed", "-1", "greater than or equal to 0"]),
        ("train.seed=one", ["train.seed", "'one'", "whole number"]),
        ("model.channels=1.5", ["model.channels", "1.5", "whole number"]),
        ("model.image_size=31", ["model", "31"]),
        ("model.attention_resolutions=[4]", ["attention_resolutions", "4 px"]),
        ("method.kind=magic", ["method.kind", "magic", "'ct'"]),
        ("method.solver=heun", ["method.solver", "ct"]),
        ("engine.precision=fp8", ["engine.precision", "fp8", "bf16"]),
        ("train.seed", ["train.seed", "key=value"]),
        ("data.path=", ["data.path", "null"]),
        ("data.path=/a\n/b", ["'data.path=/a\\n/b'", "several lines", "write it in one"]),
        ('data.path="/a\n/b"', ["several lines", "write it in one"]),
        ("slurm.setup=[module load a\nmodule load b]", ["several lines", "write it in one"]),
        ("train.seed=2024_01", ["'2024_01'", "whole number"]),
        ("train.seed=[", ["train.seed", "not YAML"]),
        ("method.sigma_min=90", ["method", "90", "80"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate"]),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_cure(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(TEXT, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_joined_parameters_are_refused_where_each_is_partitioned() -> None:
    with pytest.raises(UserError, match=r"engine.parameters: joined can't .*engine.zero_stage 3; use separate, or 2"):
        parse_config(TEXT, ["engine.parameters=joined", "engine.zero_stage=3"])
    assert parse_config(TEXT, ["engine.parameters=joined"]).engine.zero_stage == 2


@pytest.mark.parametrize("method", ["{kind: sct}", "{kind: scd, teacher: t, tangent: jvp}"])
def test_compiled_blocks_are_refused_where_a_loss_takes_forward_mode_derivatives(method: str) -> None:
    text = TEXT.replace("{kind: ct}", method)
    with pytest.raises(UserError, match=r"model.compile: blocks can't .*method.kind s\w\w; use off, or method.tangent"):
        parse_config(text, ["model.compile=blocks"])
    for kind in ("central_differences", "backward_differences"):
        parse_config(text, ["model.compile=blocks", f"method.tangent={kind}"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (TEXT + "more: 1\n", "more: unknown section"),
        (TEXT + "train: {}\n", "given twice"),
        (TEXT.replace("data: {path: s3://bucket/data}\n", ""), "data: is missing"),
        ("- a\n- b\n", "holds a list; write sections"),
        ("method: [\n", "not YAML"),
        (TEXT + "ema:\n\trates: [0.9]\n", "is indented by a tab; indent by spaces"),
        (TEXT + "ema:\n\u00a0\u00a0rates: [0.9]\n  lengths: []\n", "is indented by U+00A0, which looks like a space;"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: no such file"):
        read_config(tmp_path / "absent.yaml")


def test_a_list_and_a_block_may_have_several_lines() -> None:
    assert parse_config(TEXT, ["slurm.setup=- module load a\n- module load b"]).slurm.setup == (
        "module load a",
        "module load b",
    )
    assert parse_config(TEXT, ["sampling.times=[80,\n  4.4]"]).sampling.times == (80.0, 4.4)
    assert parse_config(TEXT, ["slurm.setup=&a [x]"]).slurm.setup == ("x",)
    with pytest.raises(UserError):
        parse_config(TEXT, ["slurm.setup=&a [*a]"])


def test_underscores_make_a_number_of_thousands_alone() -> None:
    assert parse_config(TEXT, ["train.total_steps=600_000"]).train.total_steps == 600_000
    assert parse_config(TEXT, ["slurm.account=2024_01"]).slurm.account == "2024_01"


def test_scientific_notation_is_a_number_as_people_write_it() -> None:
    assert parse_config(TEXT, ["optimizer.learning_rate=3e-5"]).optimizer.learning_rate == 3e-5
    assert parse_config(TEXT, ["optimizer.eps=1.5e-7"]).optimizer.eps == 1.5e-7


def test_off_is_a_word_and_false_is_not() -> None:
    assert parse_config(TEXT, ["wandb.mode=off"]).wandb.mode == "off"
    assert parse_config(TEXT, ["data.flip=false"]).data.flip is False


def test_overrides_reach_every_leaf() -> None:
    """Every known key works as an override for at least one method: overrides alone make its config."""
    unreached = set(known_keys())
    for kind in json_schema()["properties"]["method"]["discriminator"]["mapping"]:
        more = ["method.teacher=runs/teacher"] if "method.teacher" in known_keys() and kind in _with_teacher() else []
        config = parse_config(TEXT, [f"method.kind={kind}", *more])
        shown = {
            key: "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
            for key, value, _ in leaves(config)
        }
        assert parse_config("{}", [f"{key}={value}" for key, value in shown.items()]) == config
        unreached -= shown.keys()
    assert unreached == set()


def _with_teacher() -> set[str]:
    schema = json_schema()
    mapping = schema["properties"]["method"]["discriminator"]["mapping"]
    names = {kind: reference.rsplit("/", 1)[1] for kind, reference in mapping.items()}
    return {kind for kind, name in names.items() if "teacher" in schema["$defs"][name]["properties"]}


SOURCES = [ROOT / folder for folder in ("cmscale", "launchers", "data_prep")]


def test_every_leaf_is_read_by_the_code() -> None:
    """Every field of every section is read from an expression of that section's type, outside of validators."""
    assert unread_leaves(SOURCES) == []


@pytest.mark.long
def test_leaves_that_nothing_reads_are_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "cmscale", tmp_path / "cmscale", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("consistency/losses/ict.py", "training/sample_grid.py", "engine/optimizer.py"):
        (tmp_path / "cmscale" / module).unlink()
    assert sorted(unread_leaves([tmp_path / "cmscale", *SOURCES[1:]])) == [
        *("ICT.p_mean", "ICT.p_std"),  # EDM and ECT have keys of the same names
        *("Optimizer.betas", "Optimizer.eps", "Optimizer.weight_decay"),
        "Train.sample_count",
    ]


def test_the_fingerprint_is_of_what_moves_the_losses() -> None:
    config = parse_config(TEXT)
    same = ["train.log_every=7", "engine.zero_stage=3", "data.path=elsewhere", "train.micro_batch_size=1"]
    other = ["train.seed=1", "method.mu0=0.9", "train.global_batch_size=16", "train.total_steps=20"]
    assert all(parse_config(TEXT, [override]).fingerprint() == config.fingerprint() for override in same)
    assert all(parse_config(TEXT, [override]).fingerprint() != config.fingerprint() for override in other)
    changed = parse_config(TEXT, ["train.seed=1"])
    assert differences(trajectory(config), trajectory(changed)) == ["train.seed: 0 -> 1"]


def test_edm_may_train_longer_after_a_resume() -> None:
    short, long = (parse_config(TEXT, ["method.kind=edm", f"train.total_steps={steps}"]) for steps in (10, 20))
    assert short.fingerprint() == long.fingerprint()


@given(ranks=st.integers(1, 64), micro=st.integers(1, 16), accumulation=st.integers(1, 16))
def test_accumulation_is_what_makes_the_global_batch(ranks: int, micro: int, accumulation: int) -> None:
    batch = ranks * micro * accumulation
    config = parse_config(TEXT, [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"])
    assert accumulation_steps(config, num_ranks=ranks) == accumulation
    if ranks * micro > 1:
        odd = parse_config(TEXT, [f"train.global_batch_size={batch + 1}", f"train.micro_batch_size={micro}"])
        with pytest.raises(UserError, match="not divisible"):
            accumulation_steps(odd, num_ranks=ranks)
