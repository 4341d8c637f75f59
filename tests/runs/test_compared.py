"""What `cmscale compare` says of runs: scores, curves, configs, on every terminal, as JSON and as a page."""

import io
import json
import re
import sys
from pathlib import Path

from commands import run
from run_folder import working_run, write_evaluation

from cmscale.report.comparison import bars
from cmscale.report.facts import read_several
from cmscale.report.quality import quality_panels
from cmscale.runs.log import append_line


def test_a_terminal_without_bars_gets_letters(tmp_path: Path, monkeypatch) -> None:
    one, two = working_run(tmp_path / "one"), working_run(tmp_path / "two")
    shown = []
    for encoding in ("latin-1", "utf-8"):
        printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", printed)
        assert run(monkeypatch, "compare", one.root, two.root) == 0
        shown.append(printed.buffer.getvalue().decode(encoding))  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which has no encoding
    assert run(monkeypatch, "compare", one.root, two.root) == 0
    assert re.search(r"Loss +one +@[@*+=._-]{38}_ ", shown[0])
    assert re.search(r"Loss +one +█[▁-█]{38}▁ ", shown[1])


def test_bars_have_no_gaps_between_a_runs_values() -> None:
    drawn = {"first": 0, "last": 100, "low": 0.0, "high": 7.0, "log": False}
    assert bars([(0, 0.0), (50, 7.0)], **drawn) == "▁" * 20 + "█"
    assert bars([(50, 7.0), (99, 0.0)], **drawn) == " " * 20 + "█" * 19 + "▁"


def test_compared_metrics_carry_the_name_of_their_features(tmp_path: Path, monkeypatch, capsys) -> None:
    """KID over other features than the FID Inception's is no KID."""
    one, two = working_run(tmp_path / "one"), working_run(tmp_path / "two")
    for each in (one, two):
        write_evaluation(each, step=100, nfe=1, values=(30.0,), metrics={"kid": 0.5}, features="efficientnet_lite0")
    assert run(monkeypatch, "compare", one.root, two.root) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(next(line for line in lines if "KID-EfficientNet" in line))
    assert lines[at].split() == [
        "step",
        "weights",
        "NFE",
        "FD-EfficientNet",
        "KID-EfficientNet",
        "precision-EfficientNet",
    ]
    assert lines[at + 1].split()[:6] == ["one", "100", "ema_0.999", "1", "30", "0.5"]
    monkeypatch.setattr("cmscale.cli.command._WIDTH_OF_FILES", 60)  # a column for each
    assert run(monkeypatch, "compare", one.root, two.root) == 0
    assert re.search(r"KID-EfficientNet +0\.5 +0\.5 ", capsys.readouterr().out)
    monkeypatch.setattr("cmscale.cli.command._WIDTH_OF_FILES", 38)  # the score alone
    assert run(monkeypatch, "compare", one.root, two.root) == 0
    said = capsys.readouterr().out
    assert "KID" not in said
    assert "the other metrics: a wider terminal" in said
    assert run(monkeypatch, "compare", one.root, two.root, "--out", tmp_path / "page.html") == 0
    assert '<th class="metric">KID-EfficientNet</th>' in (tmp_path / "page.html").read_text()


def test_results_against_two_references_of_one_name_are_in_two_tables(tmp_path: Path, monkeypatch, capsys) -> None:
    one, two = working_run(tmp_path / "one"), working_run(tmp_path / "two")
    write_evaluation(one, step=100, nfe=1, values=(30.0,), reference="0123")
    write_evaluation(two, step=100, nfe=1, values=(20.0,), reference="4567")
    assert run(monkeypatch, "compare", one.root, two.root) == 0
    said = capsys.readouterr().out
    assert said.count("500 samples against crops (") == 2
    assert run(monkeypatch, "compare", one.root, two.root, "--json") == 0
    bases = [each["basis"] for each in json.loads(capsys.readouterr().out)["scores"]]
    assert sorted(bases) == [f"FD-EfficientNet, 500 samples against crops ({each})" for each in ("0123", "4567")]
    assert run(monkeypatch, "compare", one.root, two.root, "--out", tmp_path / "page.html") == 0
    assert all(f"<th>{each}</th>" in (tmp_path / "page.html").read_text() for each in bases)


def test_a_run_that_was_measured_once_is_a_point_beside_the_curves_of_others(tmp_path: Path) -> None:
    once, often = working_run(tmp_path / "once"), working_run(tmp_path / "often")
    write_evaluation(once, step=100, nfe=1, values=(30.0,))
    assert quality_panels(read_several([once, often])) == []
    for step in (50, 100):
        write_evaluation(often, step=step, nfe=1, values=(20.0,))
    write_evaluation(often, step=100, nfe=2, values=(10.0,))
    (drawn,) = [svg for title, _, svg in quality_panels(read_several([once, often])) if title.endswith("over training")]
    assert re.findall(r">(\w+), [^<]*, (\d) NFE<", drawn) == [("once", "1"), ("often", "1")]


def test_curves_of_other_batches_are_compared_by_images_seen(tmp_path: Path, monkeypatch, capsys) -> None:
    """A run of four times the batch has seen four times the images at a step."""
    runs = [working_run(tmp_path / name, steps=0) for name in ("one", "two")]
    for each, batch in zip(runs, (64, 256), strict=True):
        for step in range(10, 101, 10):
            append_line(each.metrics, {"step": step, "samples": batch * step, "loss": 1 / step})
    folders = [each.root for each in runs]
    assert run(monkeypatch, "compare", *folders) == 0
    said = capsys.readouterr().out
    assert "by images seen" in said
    assert re.search(r"Loss +one +[▁-█]{10} {10,}0.1 ", said)
    assert re.search(r"Loss +two +[▁-█]{36,40} +0.1 ", said)
    assert run(monkeypatch, "compare", *folders, "--json") == 0
    curves = json.loads(capsys.readouterr().out)["curves"]
    assert [curves[key]["two"][0] for key in ("loss", "samples")] == [[10, 0.1], [10, 2560]]
    assert run(monkeypatch, "compare", *folders, "--out", tmp_path / "page.html") == 0
    assert ">images seen</text>" in (tmp_path / "page.html").read_text()
    for each in runs:
        for step in (40, 80):
            write_evaluation(each, step=step, nfe=1, values=(1000.0 / step,))
    quality = quality_panels(read_several(runs), by_images=True)
    (drawn,) = [svg for title, _, svg in quality if title.endswith("over training")]
    assert ">images seen</text>" in drawn
    assert ">20k</text>" in drawn  # two had seen 256 * 80 images at step 80
    assert run(monkeypatch, "compare", *folders, "--out", tmp_path / "page.html") == 0
    assert ">training step</text>" not in (tmp_path / "page.html").read_text()
    append_line(runs[0].metrics, {"step": 101, "samples": 64 * 101, "loss": 0.5})
    assert run(monkeypatch, "compare", runs[0].root, working_run(tmp_path / "unknown").root) == 0
    assert "by step" in capsys.readouterr().out


def test_a_run_that_repeated_some_steps_is_compared_by_step(tmp_path: Path, monkeypatch, capsys) -> None:
    """It has seen some more images at a step than another run of its batch; up to 5 percent count as the same batch."""
    runs = [working_run(tmp_path / name, steps=0) for name in ("one", "two")]
    for seen, by in ((64 * 104, "by step"), (64 * 106, "by images seen")):
        for each, samples in zip(runs, (64 * 100, seen), strict=True):
            append_line(each.metrics, {"step": 100, "samples": samples, "loss": 0.5})
        assert run(monkeypatch, "compare", *(each.root for each in runs)) == 0
        assert by in capsys.readouterr().out


def test_a_damaged_config_is_one_line_whatever_its_mistakes(tmp_path: Path, monkeypatch, capsys) -> None:
    one, damaged = working_run(tmp_path / "one"), working_run(tmp_path / "damaged")
    damaged.config.write_text(damaged.config.read_text() + "newer: {key: 1}\nnewest: {key: 1}\n")
    assert run(monkeypatch, "compare", one.root, damaged.root) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert "newer: unknown section" in said
    assert said.endswith(f"(and more: cmscale estimate {damaged.config} prints all)")


def test_runs_are_compared_on_the_terminal_as_json_and_as_a_page(tmp_path: Path, monkeypatch, capsys) -> None:
    one = working_run(tmp_path / "one")
    two = working_run(tmp_path / "two", train__seed=1, data__workers=2)
    write_evaluation(one, step=100, nfe=1, values=(30.0,))
    write_evaluation(two, step=100, nfe=1, values=(20.0,))
    write_evaluation(two, step=100, nfe=1, values=(1.0,), num_samples=100)  # not comparable with the others
    assert run(monkeypatch, "compare", one.root, two.root) == 0
    text = capsys.readouterr().out
    assert text.index("500 samples") < text.index("two  ") < text.index("one  ") < text.index("100 samples")
    assert "█" in text
    assert "\n\n changes the losses" in text
    assert "\n\n does not change the losses" in text
    assert text.index("changes the losses") < text.index("train.seed") < text.index("data.workers")
    assert run(monkeypatch, "compare", one.root, two.root, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["run"] for each in found["scores"]] == ["two", "one", "two"]
    assert found["curves"]["loss"]["one"][0] == [10, 0.1]
    page = tmp_path / "page.html"
    assert run(monkeypatch, "compare", one.root, two.root, "--out", page) == 0
    written = page.read_text()
    for part in ("train.seed", "<svg", "500 samples", "Loss", "20", "30"):
        assert part in written
    capsys.readouterr()
    newer, damaged = working_run(tmp_path / "newer"), working_run(tmp_path / "damaged")
    newer.config.write_text(newer.config.read_text() + "newer_section: {key: 1}\n")
    damaged.config.write_text("method: [\x0f")
    everything = [each.root for each in (one, newer, damaged, two)]
    assert run(monkeypatch, "compare", *everything, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    (seed,) = [each for each in found["differences"] if each["key"] == "train.seed"]
    assert seed["values"] == [0, "unreadable", "unreadable", 1]
    assert set(found["curves"]["loss"]) == {"one", "newer", "damaged", "two"}
    assert [line.count("newer_section") + line.count("not YAML") for line in found["unreadable"]] == [1, 1]
    assert said.err.count("note: not compared: ") == 2
    assert run(monkeypatch, "compare", *everything, "--out", page) == 0
    assert "newer_section: unknown section" in page.read_text()
    assert run(monkeypatch, "compare", *everything) == 0
    capsys.readouterr()
    for arguments, words in (([one.root], "give two or more"), ([one.root, tmp_path], "not a run")):
        assert run(monkeypatch, "compare", *arguments) == 2
        assert words in capsys.readouterr().err


def test_a_metric_that_is_not_a_number_is_null_in_json(tmp_path: Path, monkeypatch, capsys) -> None:
    """JSON has no word for it, and other programs refuse `NaN`."""
    one, two = working_run(tmp_path / "one"), working_run(tmp_path / "two")
    write_evaluation(one, step=100, nfe=1, values=(30.0,), metrics={"kid": 7.0})
    (file,) = one.evaluations.iterdir()
    file.write_text(file.read_text().replace("7.0", "NaN"))
    assert run(monkeypatch, "compare", one.root, two.root, "--json") == 0
    said = capsys.readouterr().out
    assert "NaN" not in said
    assert json.loads(said)["scores"][0]["metrics"] == {"fid": 30.0, "precision": 0.5, "kid": None}
