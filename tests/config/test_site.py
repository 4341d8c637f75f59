"""The site file and the variables of sbatch: what they set, what lies over them, and mistakes in them."""

import json
import os
from pathlib import Path

import pytest
from commands import run
from run_folder import working_run

from cmscale.config import parse_config
from cmscale.config.sbatch_variables import environment_layers, unused_variables
from cmscale.config.site import (
    read_launch_settings,
    read_site,
    site_layers,
    use_site,
)
from cmscale.errors import UserError

CONFIG = """
method: {kind: edm}
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, head_channels: 32}
data: {path: data}
optimizer: {learning_rate: 1e-3}
train: {total_steps: 3, global_batch_size: 8, micro_batch_size: 2}
"""
SITE = """
slurm: {account: team, qos: normal, mem_per_cpu: 4G, setup: ['export X=$HOME']}
restart: {signal_seconds: 300}
data: {cache_dir: $SCRATCH/cache}
evaluate: {inception_weights: ~/inception.pth}
flags: {cluster: slurm, runs_dir: '$SCRATCH/runs', partition: gpu, gpus_per_node: a100:4, time: 24:00:00}
environment: {CMSCALE_CACHE: $SCRATCH/weights, TZ: UTC}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "site.yaml"
    file.write_text(SITE)
    for name in os.environ:
        if name.startswith(("SBATCH_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CMSCALE_SITE", str(file))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    return file


def test_values_lie_beneath_the_environments_the_configs_and_the_command_lines(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_QOS", "long")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "30")
    origins: dict[str, str] = {}
    text = f"{CONFIG}slurm: {{mem_gb: 64, constraint: nvlink}}\n"
    overrides = ["restart.signal_seconds=60", "slurm.constraint=null"]
    config = parse_config(text, overrides, origin="file", beneath=site_layers(), origins=origins)
    slurm = config.slurm
    assert (slurm.account, slurm.qos, slurm.partition, slurm.gpus_per_node) == ("team", "long", "gpu", "a100:4")
    assert (slurm.time, slurm.mem_gb, slurm.mem_per_cpu, slurm.constraint) == ("30", 64, None, None)
    assert config.restart.signal_seconds == 60
    assert config.data.cache_dir == "/scratch/me/cache"
    assert config.evaluate.inception_weights == "/home/me/inception.pth"
    assert slurm.setup == ("export X=$HOME",)  # the shell's own, at run time
    of_site = f"site file {site}"
    assert {key: origins[key] for key in ("slurm.account", "slurm.partition", "data.cache_dir")} == {
        "slurm.account": of_site,
        "slurm.partition": of_site,
        "data.cache_dir": of_site,
    }
    assert (origins["slurm.qos"], origins["slurm.time"]) == ("SBATCH_QOS", "SBATCH_TIMELIMIT")
    assert (origins["slurm.mem_gb"], origins["restart.signal_seconds"]) == ("file", "command line")
    assert "slurm.reservation" not in origins


def test_flags_and_variables_of_commands(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMSCALE_CACHE", raising=False)
    monkeypatch.setenv("TZ", "CET")  # what is set already stays
    flags = use_site().flags
    assert (flags.cluster, flags.runs_dir) == ("slurm", "/scratch/me/runs")
    assert (os.environ["CMSCALE_CACHE"], os.environ["TZ"]) == ("/scratch/me/weights", "CET")
    monkeypatch.delenv("CMSCALE_CACHE")


def test_a_variable_gets_a_number_as_it_is_written(site: Path) -> None:
    site.write_text("environment: {TOOL_VERSION: 1.10, FRACTION: 0.9, SIZE: 1_000, MASK: 0x10, CODE: '007'}\n")
    os.utime(site, ns=(1, 10))
    written = {"TOOL_VERSION": "1.10", "FRACTION": "0.9", "SIZE": "1_000", "MASK": "0x10", "CODE": "007"}
    assert read_site().environment == written


def test_the_values_of_one_command_line_stay_out_of_the_sites(site: Path) -> None:
    site.write_text("slurm: {extra: {hint: nomultithread}}\n")
    os.utime(site, ns=(1, 11))
    changed = parse_config(CONFIG, ["slurm.extra.switches=1"], beneath=site_layers())
    assert changed.slurm.extra == {"hint": "nomultithread", "switches": 1}
    assert parse_config(CONFIG, beneath=site_layers()).slurm.extra == {"hint": "nomultithread"}


def test_commands_without_a_config_have_the_sections_of_launching(site: Path) -> None:
    settings = read_launch_settings(["slurm.qos=short"])
    assert (settings.slurm.account, settings.slurm.qos, settings.restart.signal_seconds) == ("team", "short", 300)
    with pytest.raises(UserError, match="only keys of slurm and restart"):
        read_launch_settings(["train.seed=1"])


def test_an_estimate_counts_with_the_sites_values(site: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    site.write_text("engine: {zero_stage: 3}\n")
    os.utime(site, ns=(1, 12))
    file = tmp_path / "c.yaml"
    for text, stage in ((CONFIG, 3), (f"{CONFIG}engine: {{zero_stage: 1}}\n", 1)):
        file.write_text(text)
        assert run(monkeypatch, "estimate", file, "train.micro_batch_size=1", "--json") == 0
        assert json.loads(capsys.readouterr().out)["memory_per_rank"]["zero_stage"] == stage


def test_runs_are_listed_where_the_site_keeps_them(site: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    site.write_text(f"flags: {{runs_dir: {tmp_path}/shared}}\n")
    os.utime(site, ns=(1, 13))
    working_run(tmp_path / "shared" / "one")
    assert run(monkeypatch, "runs", "--json") == 0
    assert [each["run"] for each in json.loads(capsys.readouterr().out)] == ["one"]
    assert run(monkeypatch, "runs", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMSCALE_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert read_site().origin == ""
    (tmp_path / "cmscale").mkdir()
    (tmp_path / "cmscale" / "site.yaml").write_text("slurm: {account: mine}")
    assert read_site().tree == {"slurm": {"account": "mine"}}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_site().origin == ""
    (tmp_path / ".config").symlink_to(tmp_path)
    assert read_site().tree == {"slurm": {"account": "mine"}}
    monkeypatch.setenv("CMSCALE_SITE", "")  # none at all
    assert read_site().origin == ""
    monkeypatch.setenv("CMSCALE_SITE", str(tmp_path / "gone.yaml"))
    with pytest.raises(UserError, match=r"CMSCALE_SITE: .*gone\.yaml: no such file"):
        read_site()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slurm: {acount: x}", r"slurm\.acount: unknown key; did you mean slurm\.account\?"),
        ("slrum: {account: x}", "slrum: unknown section; a site sets slurm, restart"),
        ("slurm: {cpus_per_task: many}", r"slurm\.cpus_per_task: got 'many'; it should be a whole number"),
        ('slurm: {account: "a\\nb"}', r"slurm\.account: got 'a\\nb'; line breaks"),
        ("slurm: {mem_gb: 4, mem: 5G}", "slurm: mem_gb and mem are both given"),
        ("optimizer: {learning_rate: 1}", "optimizer: unknown section"),
        ("data: {flip: false}", r"data\.flip: belongs to each run"),
        ("data: {path: x}", r"data\.path: belongs to each run"),
        ("data: {cache_dir: $NOWHERE/x}", r"data\.cache_dir: \$NOWHERE is not set"),
        ("flags: {name: x}", r"flags\.name: unknown key"),
        ("flags: {cluster: moon}", r"flags\.cluster: got 'moon'"),
        ("slurm: {account: a}\nflags: {time: soon}", r"line 2: flags\.time: got 'soon'; write minutes"),
        ("flags: {partition: a}\nslurm: {partition: b}", r"flags\.partition and slurm\.partition are both given"),
        ("environment: {A-B: x}", r"environment\.A-B: got 'x'; write NAME: text"),
        ('environment: {AB: "x\\ny"}', r"environment\.AB: .*line breaks"),
        ("slurm: 5", "slurm: got 5; write keys and values"),
        ("just text", "holds a single value; write sections"),
        ("a: [", "not YAML"),
        ("slurm: {account: a, account: b}", "'account' is given twice"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file(text: str, words: str, site: Path) -> None:
    site.write_text(text)
    os.utime(site, ns=(1, hash(text)))  # another time, however fast the test is
    with pytest.raises(UserError, match=words) as raised:
        read_site()
    assert str(site) in str(raised.value) or "given twice" in words
    assert "\n" not in str(raised.value)


def test_each_variable_of_sbatch_that_describes_a_job_holds_as_a_key() -> None:
    environment = {
        "SBATCH_ACCOUNT": "team",
        "SBATCH_PARTITION": "gpu",
        "SBATCH_GPUS_PER_NODE": "a100:4",
        "SBATCH_MEM_PER_NODE": "500G",
        "SBATCH_EXCLUSIVE": "",
        "SBATCH_REQ_SWITCH": "1",
        "SBATCH_WAIT4SWITCH": "10:00",
        "SBATCH_SPREAD_JOB": "",
        "SBATCH_ACCTG_FREQ": "30",
        "SLURM_CLUSTERS": "big",
        "SLURM_MEM_PER_CPU": "4096",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_ARRAY_INX": "1-3",
        "SBATCH_DEBUG": "1",
        "HOME": "x",
    }
    said = {layer.origin: dict(layer.tree["slurm"]) for layer in environment_layers(environment)}
    assert said == {
        "SBATCH_ACCOUNT": {"account": "team"},
        "SBATCH_PARTITION": {"partition": "gpu"},
        "SBATCH_GPUS_PER_NODE": {"gpus_per_node": "a100:4"},
        "SBATCH_MEM_PER_NODE": {"mem": "500G"},
        "SBATCH_EXCLUSIVE": {"exclusive": True},
        "SBATCH_REQ_SWITCH": {"extra": {"switches": "1@10:00"}},
        "SBATCH_SPREAD_JOB": {"extra": {"spread-job": True}},
        "SBATCH_ACCTG_FREQ": {"extra": {"acctg-freq": "30"}},
        "SLURM_CLUSTERS": {"extra": {"clusters": "big"}},
    }
    assert unused_variables(environment) == ["SBATCH_ARRAY_INX", "SBATCH_EXPORT"]
    in_a_job = environment_layers({"SLURM_JOB_ID": "7", "SLURM_CLUSTERS": "big"})
    assert in_a_job == []  # Slurm's own
    with pytest.raises(UserError, match=r"SBATCH_TIMELIMIT: slurm\.time: got 'soon'"):
        environment_layers({"SBATCH_TIMELIMIT": "soon"})
    with pytest.raises(UserError, match=r"SBATCH_ACCOUNT: slurm\.account: got 'a\\nb'"):
        environment_layers({"SBATCH_ACCOUNT": "a\nb"})
