"""The section `slurm`: everything that sbatch knows can be said, and nothing that would break a batch script."""

from pathlib import Path

import pytest

from cmscale.config import Slurm
from cmscale.config.files import parse_config, read_config, validated
from cmscale.config.layers import Layer, merged
from cmscale.config.site import LaunchSettings
from cmscale.config.slurm import OWN_OPTIONS, parse_gpus, parse_minutes
from cmscale.errors import UserError


def section(*overrides: str, **values: object) -> Slurm:
    return validated(LaunchSettings, [Layer("file", {"slurm": values})], list(overrides), origin="test").slurm


def test_every_key_becomes_the_option_of_its_name() -> None:
    texts = {
        "account": "team",
        "qos": "long",
        "constraint": "a100&nvlink",
        "reservation": "r",
        "nodelist": "node[1-4]",
        "exclude": "node7",
        "exclusive": "user",
        "gres": "nvme:1",
        "licenses": "matlab:2",
        "dependency": "afterok:17",
        "comment": "it's mine",
        "mail_user": "me@example.org",
        "mail_type": "BEGIN,END",
        "wckey": "project",
    }
    options = section(**texts, mem_per_gpu="80G").options()
    assert options == {name.replace("_", "-"): value for name, value in texts.items()} | {"mem-per-gpu": "80G"}
    assert section().options() == {"mem": "0"}  # no wckey, though submitit has one of its own


def test_memory_is_said_in_one_way_or_not_at_all() -> None:
    assert section(mem_gb=64).options() == {"mem": "64GB"}
    assert section(mem_gb=None).options() == {}
    assert section(mem="500M").options() == {"mem": "500M"}
    assert section(mem_per_cpu=4096).options() == {"mem-per-cpu": "4096"}
    with pytest.raises(UserError, match="mem_gb and mem_per_cpu are both given"):
        section(mem_gb=64, mem_per_cpu="4G")
    assert section("slurm.mem_per_cpu=4G", mem_gb=64).options() == {"mem-per-cpu": "4G"}  # laid over the file's
    with pytest.raises(UserError, match="mem and mem_per_cpu are both given"):
        section("slurm.mem_per_cpu=4G", "slurm.mem=5G")


def test_lists_are_joined_and_flags_have_no_value() -> None:
    assert section(exclude=["a", "b"], mem_gb=None).options() == {"exclude": "a,b"}
    assert section("slurm.account=1234", "slurm.exclude=007", mem_gb=None).options() == {
        "account": "1234",
        "exclude": "007",
    }
    assert section(exclusive=True, mem_gb=None).options() == {"exclusive": True}
    assert section(exclusive=False, mem_gb=None).options() == {}
    extra = {"switches": 1, "spread-job": True, "contiguous": False, "nice": None, "cpus_per_gpu": 8}
    assert section(extra=extra, mem_gb=None).options() == {"switches": "1", "spread-job": True, "cpus-per-gpu": "8"}
    assert section("slurm.extra.nice=5", extra={"switches": 1}).extra == {"switches": 1, "nice": 5}


STRINGS = [name for name, field in Slurm.model_fields.items() if "AfterValidator" in str(field.annotation)]


@pytest.mark.parametrize("bad", ["a\nb", "a\r", "a\x00b", "a\x1b[0m", "a\u2028b", "a\u202eb", "", "  "])
def test_no_value_breaks_a_line_of_the_script(bad: str) -> None:
    assert {"account", "partition", "exclude", "comment", "mem", "python"} <= set(STRINGS)
    for name in STRINGS:
        if name not in ("srun_args", "setup"):
            with pytest.raises(UserError, match=f"slurm.{name}"):
                section(**{name: bad})
    for name in ("srun_args", "setup"):
        with pytest.raises(UserError, match=rf"slurm.{name}\.1"):
            section(**{name: ["fine", bad]})
    for extra in ({"switches": bad}, {f"{bad}-x": 1}):
        with pytest.raises(UserError, match=r"slurm\.extra"):
            section(extra=extra)
    for name in ("gpus_per_node", "time", "exclusive"):
        with pytest.raises(UserError, match=rf"slurm\.{name}"):
            section(**{name: bad})


@pytest.mark.parametrize("option", sorted(OWN_OPTIONS))
def test_what_the_launcher_says_itself_is_refused_with_the_reason(option: str) -> None:
    with pytest.raises(UserError, match=rf"slurm\.extra\.{option}: can't be set here: "):
        section(extra={option: "x"})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"account": "x"}, r"slurm\.extra\.account: has a key of its own; write slurm\.account"),
        ({"mail-user": "x"}, "write slurm.mail_user"),
        ({"A": "x"}, r"slurm\.extra\.A: no option; write its long name"),
        ({"--switches": 1}, r"slurm\.extra\.--switches: no option"),
        ({"switches": [1]}, r"slurm\.extra\.switches: got list"),
        ({"core-spec": 1, "core_spec": 2}, r"slurm\.extra\.core_spec: is given twice"),
    ],
)
def test_other_mistakes_in_extra_are_named(extra: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        section(extra=extra)


def test_a_mistake_in_extra_is_where_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("slurm:\n  extra:\n    switches: 1\n    comment: x\n")
    with pytest.raises(UserError, match=r"c\.yaml, line 4: slurm\.extra\.comment: has a key of its own"):
        read_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("slurm:\n  extra:\n    switches: 1\n")
    with pytest.raises(UserError, match=r"command line: slurm\.extra\.comment: has a key of its own"):
        read_config(tmp_path / "c.yaml", ["slurm.extra.comment=x"])


def test_gpus_and_times_are_read_as_slurm_writes_them() -> None:
    assert parse_gpus("a100:4") == ("a100", 4)
    assert parse_gpus("1g.5gb:7") == ("1g.5gb", 7)
    assert parse_gpus(8) == (None, 8)
    for bad in ("a100", "a100:", ":4", "0", "a100:0", "-1", "4:a100", "a 100:4"):
        with pytest.raises(ValueError, match="TYPE:NUMBER"):
            parse_gpus(bad)
    assert [parse_minutes(text) for text in ("90", "90:30", "1:30:00", "2-00", "UNLIMITED")] == [
        90,
        91,
        90,
        2880,
        525600,
    ]
    for gres, count in (
        ("gpu", 1),
        ("gpu:4", 4),
        ("nvme:1,gpu:a100:4(S:0-1)", 4),
        ("gres/gpu:2", 2),
        ("shard:2", None),
    ):
        assert section(gres=gres).gpus_in_gres() == count
    with pytest.raises(UserError, match="gres gpu:4 and gpus_per_node 8 differ"):
        section(gres="gpu:4", gpus_per_node=8)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "1" * 1_000_000 + ":", "x" * 1_000_000 + ":0"])
def test_a_long_text_in_place_of_gpus_is_refused_without_trying_each_way_to_cut_it(text: str) -> None:
    with pytest.raises(ValueError, match="write a number, or TYPE:NUMBER"):
        parse_gpus(text)
    settings = Slurm(gres=f"gpu:{text}:(")
    assert settings.gpus_in_gres() is None


def test_interpreters_are_words_of_a_shell() -> None:
    assert section().rank_interpreter("/own") == section().batch_interpreter("/own") == ["/own"]
    other = section(python="apptainer exec --nv 'my image.sif' python3")
    assert other.rank_interpreter("/own") == other.batch_interpreter("/own")
    assert other.rank_interpreter("/own")[3:] == ["my image.sif", "python3"]
    container = section(python="python3", srun_args=["--container-image=/x.sqsh"])
    assert (container.rank_interpreter("/own"), container.batch_interpreter("/own")) == (["python3"], ["/own"])
    assert section(python="a", batch_python="b").batch_interpreter("/own") == ["b"]
    with pytest.raises(UserError, match=r"python: got \"it's\"; No closing quotation"):
        section(python="it's")


def test_layers_lie_over_one_another_and_each_value_knows_its_own() -> None:
    tree, origins = merged(
        [
            Layer("site", {"slurm": {"account": "a", "mem_per_cpu": "4G", "extra": {"switches": 1}}}),
            Layer("SBATCH_QOS", {"slurm": {"qos": "long"}}),
            Layer("file", {"slurm": {"account": None, "mem_gb": 64, "extra": {"nice": 1}}, "train": {"seed": 1}}),
            Layer("empty", {"slurm": None}),
        ]
    )
    assert tree["slurm"] == {"account": None, "qos": "long", "mem_gb": 64, "extra": {"switches": 1, "nice": 1}}
    assert origins["slurm.account"] == origins["slurm.extra.nice"] == origins["train.seed"] == "file"
    assert (origins["slurm.qos"], origins["slurm.extra.switches"]) == ("SBATCH_QOS", "site")


def test_a_time_with_colons_is_text_and_not_a_number_of_base_60() -> None:
    text = "slurm: {time: 24:00:00}"
    with pytest.raises(UserError, match="method: is missing"):  # and not the time
        parse_config(text)
    assert section("slurm.time=24:00:00").time == "24:00:00"
