"""Tests that wandb gets all of a run once, in rising steps, and that training survives every failure of wandb."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from launch_fixtures import CONFIG
from run_folder import write_evaluation

from cmscale.cli import services
from cmscale.cli.app import run as run_cmscale
from cmscale.commands.ending import guarded
from cmscale.config import Wandb, dump_config, parse_config
from cmscale.errors import UserError
from cmscale.io.json_text import parse_json
from cmscale.io.wandb_login import Login, find_login
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, read_lines, write_event
from cmscale.training import wandb_mirror
from cmscale.training.metrics_log import MetricsLog
from cmscale.training.mirror import Follower
from cmscale.training.wandb_mirror import WandbMirror
from launchers.checks import check_inputs


class Server:
    """A wandb run that fails as configured: in `log` from a step on, or by blocking in `finish`."""

    def __init__(self, *, breaks_at: int = 10**9, hangs_at_the_end: bool = False) -> None:
        self.breaks_at = breaks_at
        self.hangs_at_the_end = hangs_at_the_end
        self.entries: list[tuple[int, dict[str, Any]]] = []
        self.reached = threading.Event()
        self.released = threading.Event()

    @property
    def steps(self) -> list[int]:
        return [entry["step"] for _, entry in self.entries]

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, entry: dict[str, Any], *, step: int, commit: bool) -> None:
        assert commit  # an entry that waits for the next is lost with the process
        if entry["step"] >= self.breaks_at:
            raise ConnectionError("wandb went away")
        self.entries.append((step, entry))

    def finish(self) -> None:
        self.reached.set()
        if self.hangs_at_the_end:
            self.released.wait(60)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.samples.mkdir(parents=True)
    return run


def start(server: Server, run: RunDir, monkeypatch: pytest.MonkeyPatch, **more: Any) -> MetricsLog:
    monkeypatch.setattr(wandb, "init", lambda **_: server)
    monkeypatch.setattr(wandb, "Image", lambda path, caption: f"{Path(path).name}: {caption}")
    return MetricsLog(run, Wandb(mode="offline"), config={}, active=True, **more)


def close(log: MetricsLog) -> None:
    """Closes a log with all the patience that a busy machine needs."""
    for mirror in log._mirrors:
        mirror.close(patience=300)


def test_wandb_that_goes_away_in_the_middle_costs_nothing_but_its_own_steps(run, monkeypatch, capfd) -> None:
    server = Server(breaks_at=3)
    log = start(server, run, monkeypatch)
    for step in range(1, 6):
        log.write({"step": step})
    close(log)
    assert server.steps == [1, 2]
    assert [record["step"] for record in read_lines(run.metrics)] == [1, 2, 3, 4, 5]
    assert [record["event"] for record in read_lines(run.events)] == ["wandb_failed"]
    said = capfd.readouterr().out
    assert "wandb: no more is sent (ConnectionError: wandb went away); the run's next start or `cmscale" in said
    again = Server()
    log = start(again, run, monkeypatch)
    log.write({"step": 6})
    close(log)
    assert again.steps[-4:] == [3, 4, 5, 6]  # the next start sends what this one could not


def test_wandb_that_ends_by_the_signal_which_ended_the_training_is_no_event(run, monkeypatch, capfd) -> None:
    log = start(Server(breaks_at=1), run, monkeypatch, leaving=lambda: True)
    log.write({"step": 1})
    close(log)
    assert not run.events.exists()
    assert "wandb: no more is sent" in capfd.readouterr().out


def test_a_first_start_that_could_not_begin_a_run_at_wandb_leaves_all_to_the_next(run, monkeypatch) -> None:
    def init(**_: object) -> Server:
        raise ConnectionError("no route")

    monkeypatch.setattr(wandb, "init", init)
    log = MetricsLog(run, Wandb(mode="online"), config={}, active=True)
    log.write({"step": 1})
    close(log)
    assert [record["event"] for record in read_lines(run.events)] == ["wandb_failed"]
    again = Server()
    log = start(again, run, monkeypatch)
    log.write({"step": 2})
    close(log)
    assert again.steps == [1, 2]


def test_what_wandb_was_sent_in_the_last_minute_before_a_kill_is_sent_again(run, monkeypatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    follower = Follower(run, "wandb", unsure_seconds=60)
    for step, clock[0] in ((1, 1000.0), (2, 1030.0), (3, 1060.0), (4, 1089.0)):
        append_line(run.metrics, {"step": step})
        for _ in follower.records():
            follower.mark.row += 1
        follower.keep(is_safe=False)
    again = Follower(run, "wandb")
    assert [step for step, _ in again.records()] == [2, 3, 4]
    assert again.mark.row == 3  # of the four; numbers are not used twice
    follower.keep()  # wandb has ended in order
    assert list(Follower(run, "wandb").records()) == []


def test_replayed_steps_are_sent_once_and_entries_are_numbered_on(run, monkeypatch) -> None:
    servers = []
    for steps in ([10, 20, 30], [20, 30, 40], [50]):
        servers.append(Server())
        log = start(servers[-1], run, monkeypatch)
        for step in steps:
            log.write({"step": step, "loss": 1.0 / step, "loss_q1": None, "loss_q2": float("nan")})
        close(log)
    assert [server.steps for server in servers] == [[10, 20, 30], [40], [50]]
    assert servers[0].entries[0] == (10, {"step": 10, "loss": 0.1})
    rows = [row for server in servers for row, _ in server.entries]
    assert rows == sorted(set(rows))


def test_grids_and_evaluations_are_sent_once_whoever_wrote_them(run, monkeypatch) -> None:
    server = Server()
    log = start(server, run, monkeypatch)
    log.write({"step": 100, "samples": 800})
    run.sample_grid(100).write_bytes(b"png")
    write_evaluation(run, step=50, nfe=2, values=(3.0, 5.0))
    (run.evaluations / "damaged.json").write_text("{")
    close(log)
    second = Server()
    log = start(second, run, monkeypatch)
    write_evaluation(run, step=100, nfe=1, values=(2.0,))
    close(log)
    entries = [entry for _, entry in server.entries]
    assert {"step": 100, "samples": 800} in entries  # the number of images; a curve and pictures never share a name
    assert {"step": 100, "sample_grid": "step-000000100.png: step 100"} in entries
    name = "evaluation/FD-EfficientNet/ema_0.999/nfe2/n500/ref0123"
    assert [entry[name] for _, entry in server.entries if name in entry] == [4.0]
    ((row, entry),) = second.entries
    assert (entry["step"], entry[name.replace("nfe2", "nfe1")]) == (100, 2.0)
    assert row > max(row for row, _ in server.entries)


def test_what_has_all_opens_nothing_and_offline_folders_wait_for_their_sync(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    run = RunDir(tmp_path / "a run")
    run.root.mkdir()
    run.config.write_text(dump_config(parse_config(CONFIG.format(data="data"), ["wandb.mode=offline"])))
    write_event(run, "finished", step=10, rank=0)
    write_evaluation(run, step=10, nfe=1, values=(7.0,))
    opened = 0

    def init(**_: object) -> Server:
        nonlocal opened
        opened += 1
        (run.root / "wandb" / f"offline-run-{opened}").mkdir(parents=True)
        return Server()

    monkeypatch.setattr(wandb, "init", init)
    said = []
    for _ in range(2):
        assert guarded(run_cmscale, ["mirror", str(run.root)]) == 0
        said.append(capsys.readouterr().out)
    assert opened == 1
    sync = f"wandb: 1 offline; `wandb sync '{run.root}/wandb'/offline-run-*` sends it"
    assert said == [f"wandb: has all\n{sync}\n"] * 2
    (run.root / "wandb" / "offline-run-1" / "run-1.wandb.synced").write_text("")
    assert guarded(run_cmscale, ["mirror", str(run.root)]) == 0
    assert capsys.readouterr().out == "wandb: has all\n"
    write_evaluation(run, step=10, nfe=2, values=(6.0,))
    assert guarded(run_cmscale, ["mirror", str(run.root)]) == 0
    assert opened == 2


def test_a_mirror_that_is_disabled_has_not_got_all(tmp_path: Path, monkeypatch, capsys) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(dump_config(parse_config(CONFIG.format(data="data"), ["wandb.mode=auto"])))
    write_event(run, "finished", step=10, rank=0)
    write_evaluation(run, step=10, nfe=1, values=(7.0,))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb was begun"))
    assert guarded(run_cmscale, ["mirror", str(run.root)]) == 0
    said = "disabled by WANDB_MODE; nothing is sent"
    assert capsys.readouterr().out == f"wandb: {said}\n"
    assert guarded(run_cmscale, ["mirror", str(run.root), "--json"]) == 0
    facts = {"mirrors": {"wandb": {"failure": None, "state": said}}, "unsynced": []}
    assert parse_json(capsys.readouterr().out) == facts


def test_a_server_that_takes_no_connection_is_said_at_once(run, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("it waits for a minute"))
    write_evaluation(run, step=10, nfe=1, values=(7.0,))
    mirror = WandbMirror(run, Wandb(mode="online"), config={}, only_news=True)
    mirror.close(patience=300)
    assert mirror.failure == "127.0.0.1:9 does not answer ([Errno 111] Connection refused)"


def test_a_failure_is_said_beside_the_json(tmp_path: Path, monkeypatch, capsys) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(dump_config(parse_config(CONFIG.format(data="data"), ["wandb.mode=online"])))
    write_event(run, "finished", step=10, rank=0)
    write_evaluation(run, step=10, nfe=1, values=(7.0,))

    def init(**_: object) -> Server:
        raise OSError("no route")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(Login, "why_silent", lambda _: "")
    assert guarded(run_cmscale, ["mirror", str(run.root), "--json"]) == 1
    facts = parse_json(capsys.readouterr().out)
    assert facts["mirrors"]["wandb"]["failure"] == "OSError: no route"


def test_an_evaluation_that_was_half_written_is_sent_when_it_is_whole(run) -> None:
    write_evaluation(run, step=50, nfe=2, values=(3.0,))
    (path,) = run.evaluations.glob("*.json")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    follower = Follower(run, "wandb")
    assert list(follower.evaluations()) == []
    path.write_bytes(whole)
    assert [each.step for each in follower.evaluations()] == [50]
    assert list(follower.evaluations()) == []


def test_what_an_earlier_release_sent_is_not_sent_again(run, monkeypatch) -> None:
    for step in (1, 2):
        append_line(run.metrics, {"step": step})
    run.wandb_id.write_text("an id")
    server = Server()
    log = start(server, run, monkeypatch)
    log.write({"step": 3})
    close(log)
    assert server.steps == [3]


def test_a_run_has_one_id_at_wandb_also_after_a_crash_that_left_none(run) -> None:
    run.wandb_id.touch()
    found = wandb_mirror._identity(run)
    assert found
    assert wandb_mirror._identity(run) == found == run.wandb_id.read_text()


def test_wandb_that_hangs_at_the_end_is_left_behind(run, monkeypatch) -> None:
    server = Server(hangs_at_the_end=True)
    monkeypatch.setattr(wandb, "init", lambda **_: server)
    mirror = WandbMirror(run, Wandb(mode="offline"), config={})
    append_line(run.metrics, {"step": 1})
    began = time.monotonic()
    mirror.close(patience=0.2)
    assert time.monotonic() - began < 60
    assert server.reached.wait(60)
    assert server.steps == [1]
    server.released.set()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, without variables of wandb."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("API_KEY", "BASE_URL", "MODE", "CONFIG_DIR", "DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    return tmp_path


def mode(choice: Any = "auto") -> str:
    return wandb_mirror._mode(Wandb(mode=choice))


@pytest.mark.parametrize("host", [None, "https://api.wandb.ai", "https://wandb.example.org:8443"])
def test_a_login_is_found_wherever_wandb_writes_it(home: Path, monkeypatch, host: str | None) -> None:
    from wandb.sdk.lib import urls, wbauth

    assert mode() == "offline"
    if host is not None and host != urls.DEFAULT_BASE_URL:
        monkeypatch.setenv("WANDB_BASE_URL", host)
    wbauth.write_netrc_auth(host=host or urls.DEFAULT_BASE_URL, api_key="k" * 40)
    assert mode() == "online"
    assert find_login().host in (host or urls.DEFAULT_BASE_URL)
    monkeypatch.setenv("WANDB_BASE_URL", "https://another.example.org")
    assert mode() == "offline"  # a key of another server


def test_the_users_choice_of_a_mode_counts_where_the_config_makes_none(home: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "online"
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert mode() == "offline"
    for given, found in (("disabled", "disabled"), ("dryrun", "offline"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", given)
        assert mode() == found
    assert mode("offline") == "offline"


def test_a_mode_that_wandb_does_not_have_is_named_in_one_line(run, home, monkeypatch, capfd) -> None:
    monkeypatch.setenv("WANDB_MODE", "foo")
    log = MetricsLog(run, Wandb(mode="auto"), config={}, active=True)
    close(log)
    said = "WANDB_MODE: foo is no mode of wandb; take online, offline, disabled, shared"
    assert [mirror.failure for mirror in log._mirrors] == [said]
    assert capfd.readouterr().out.count("\n") == 1
    with pytest.raises(UserError, match="foo is no mode of wandb"):
        check_inputs(parse_config(CONFIG.format(data="data")))  # before anything is queued
    assert [each.state for each in services.wandb()] == ["failure"]
    monkeypatch.delenv("WANDB_MODE")
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = bar\n")
    with pytest.raises(UserError, match=r"^wandb/settings: bar is no mode of wandb"):
        find_login()


def test_a_user_who_has_disabled_wandb_gets_no_folder_of_it(run, home, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = MetricsLog(run, Wandb(), config={}, active=True)
    log.write({"step": 1})
    close(log)
    assert not (run.root / "wandb").exists()
    assert not run.wandb_id.exists()
    assert not run.events.exists()
