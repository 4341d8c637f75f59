"""The report in a real browser: it renders, nothing overflows, and both colour schemes are legible."""

import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import run as command
from PIL import Image
from run_folder import working_run, write_evaluation, write_run

from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.report import build_report, serve
from cmscale.report.evaluations import MOST_ROWS
from cmscale.report.serve import ServedReport, server_of
from cmscale.runs.folder import RunDir
from cmscale.runs.log import append_line, write_event

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


def _chromium(profile: Path, *arguments: str) -> str:
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def run(tmp_path) -> RunDir:
    return write_run(tmp_path / "a_run")


def _screenshot(run: RunDir, profile: Path, *, width: int, dark: bool = False) -> np.ndarray:
    target = profile / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    page = run.report.as_uri()
    _chromium(profile, f"--window-size={width},2400", *scheme, f"--screenshot={target}", page)
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB"))


def test_the_page_is_drawn_with_its_grids_and_curves(run, tmp_path) -> None:
    build_report(run)
    pixels = _screenshot(run, tmp_path / "profile", width=1200).astype(int)
    assert pixels.shape == (2400, 1200, 3)
    assert pixels[5, 5].min() > 240  # light paper
    colourful = np.ptp(pixels, axis=2) > 60
    assert colourful[200:900].mean() > 0.1  # the sample grids
    accent = np.abs(pixels - [0x2F, 0x6F, 0xDB]).max(axis=2) < 12
    assert accent[1000:].sum() > 500  # the curves' lines


def test_dark_mode_has_light_ink_on_dark_paper(run, tmp_path) -> None:
    build_report(run)
    pixels = _screenshot(run, tmp_path / "profile", width=1200, dark=True).astype(int)
    assert pixels[5, 5].max() < 40
    assert (pixels[:150].min(axis=2) > 200).sum() > 300  # the title


def _probed(page: Path, script: str) -> str:
    """The title that a script gives the page; the page's own policy would not let it run."""
    probe = page.with_name("probe.html")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    probe.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return probe.as_uri()


def test_on_paper_the_page_is_short_and_has_no_buttons(run, tmp_path) -> None:
    target = tmp_path / "page.pdf"
    _chromium(tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={target}", build_report(run).as_uri())
    assert len(re.findall(rb"/Type\s*/Page\b", target.read_bytes())) <= 4


WIDTHS = """
const tables = [...document.querySelectorAll(".wide")].filter((each) => each.scrollWidth > each.clientWidth);
const long = [...document.querySelectorAll("td *")].filter((each) => each.textContent.length > 40);
const strips = long.filter((each) => each.offsetWidth < 150);
const cut = ", cut " + (tables.length + strips.length);
document.title = document.documentElement.scrollWidth + " of " + innerWidth + cut;
"""


def test_nothing_is_wider_than_the_window_and_no_table_is_cut_off(run, tmp_path) -> None:
    metrics = {metric.name: 0.125 for metric in all_metrics() if metric.name != "fid"}
    teacher = write_run(tmp_path / "a_teacher", kind="edm", nfes=(79,))
    for nfe in (1, 2):
        write_evaluation(run, step=200, nfe=nfe, values=(9.0, 10.0), metrics=metrics, warnings=("w" * 300,))
        write_event(run, "evaluated", step=200, rank=0, why=f"FD-EfficientNet 9.5, {'precision 0.5, ' * 9}NFE {nfe}")
    page = build_report(run, siblings=[teacher])
    for width in (1280, 520):  # headless windows are no narrower; the frame below is
        dom = _chromium(tmp_path / "profile", f"--window-size={width},900", "--dump-dom", _probed(page, WIDTHS))
        found = re.search(r"<title>(\d+) of (\d+), cut (\d+)</title>", dom)
        assert found is not None
        assert int(found[1]) <= int(found[2])
        assert found[3] == "0"
    frame = page.with_name("frame.html")
    inside = "onload=\"document.title = this.contentDocument.title + ', framed'\""
    frame.write_text(f'<title></title><iframe src="probe.html" width="390" height="900" {inside}></iframe>')
    dom = _chromium(tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    found = re.search(r"<title>(\d+) of (\d+), cut (\d+), framed</title>", dom)
    assert found is not None
    assert (int(found[1]) <= int(found[2]) == 390, found[3]) == (True, "0")


def test_no_score_of_a_comparison_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {metric.name: 0.125 for metric in all_metrics() if metric.name != "fid"}
    runs = [working_run(tmp_path / name) for name in ("one", "two")]
    for each in runs:
        write_evaluation(each, step=100, nfe=1, values=(30.0,), metrics=metrics)
    page = tmp_path / "page.html"
    assert command(monkeypatch, "compare", *(each.root for each in runs), "--out", page) == 0
    for width in (1280, 520):
        dom = _chromium(tmp_path / "profile", f"--window-size={width},900", "--dump-dom", _probed(page, WIDTHS))
        assert re.search(rf"<title>{width} of {width}, cut 0</title>", dom), width


SHOWN = """
const shown = (what) => [...document.querySelectorAll(what)].filter((each) => each.offsetParent);
const captions = shown("#samples figcaption").map((each) => each.textContent);
document.title = `${captions} | ${shown("button, input").length}`;
"""


def test_without_its_program_the_page_shows_every_grid_once_and_no_dead_control(run, tmp_path) -> None:
    page = build_report(run)
    page.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL))
    dom = _chromium(tmp_path / "profile", "--dump-dom", _probed(page, SHOWN))
    assert "<title>step 0,step 100,step 200 | 0</title>" in dom


SAVING = """
const saved = [];
const create = URL.createObjectURL;
let last;
URL.createObjectURL = (blob) => { last = blob; return create(blob); };
HTMLAnchorElement.prototype.click = function () { saved.push(`${this.download}:${last.type}:${last.size > 500}`); };
const slider = document.querySelector("#grids input");
const shown = () => [...document.querySelectorAll("#grids figure")].findIndex((each) => !each.hidden);
const places = [shown()];
slider.value = 1;
slider.oninput();
places.push(shown(), slider.ariaValueText);
const buttons = document.querySelectorAll("#training .card:first-of-type button, #evaluations p button");
buttons.forEach((each) => each.click());
setInterval(() => { document.title = `${places} | ${saved.sort().join(" ")}`; }, 50);
"""


def test_the_slider_shows_one_grid_and_the_buttons_save_files(run, tmp_path) -> None:
    address = _probed(build_report(run), SAVING)
    dom = _chromium(tmp_path / "profile", "--virtual-time-budget=20000", "--dump-dom", address)
    found = re.search(r"<title>([^<]*)</title>", dom)
    assert found is not None
    assert found[1].split(" | ") == [
        "2,1,step 100",
        "a_run-Loss.csv:text/csv:true a_run-Loss.png:image/png:true "
        "a_run-evaluations.csv:text/csv:true a_run-evaluations.json:application/json:true",
    ]


def test_names_from_elsewhere_are_text(tmp_path) -> None:
    hostile = "<img src=x onerror=alert(1)>\"'$\\alpha$_&amp;"
    run = write_run(tmp_path / hostile.replace("/", "∕"))
    other = write_run(tmp_path / f"_{hostile}".replace("/", "∕"))
    append_line(run.events, {"time": 1.79e9, "event": hostile, "step": 1, "rank": 0, "why": "</script><script>"})
    write_evaluation(run, step=200, nfe=1, values=(1.0,), weights=hostile, reference_name=hostile, warnings=(hostile,))
    page = build_report(run, siblings=[other])
    dom = _chromium(tmp_path / "profile", "--dump-dom", _probed(page, "document.title = document.images.length"))
    assert "<title>4</title>" in dom  # its grids, and the first again
    assert page.read_text().count("<script") == 2
    assert page.read_text().count("</script") == 2


class Growing(ServedReport):
    """A report whose run writes as soon as an open page has asked for its version.

    A script may try the first page, another the next; the page's own policy would not let them run.
    """

    asked = 0
    first = after = ""

    def current(self) -> tuple[str, bytes]:
        self.asked += 1
        if self.asked == 2:
            self.grow(RunDir(self.root))
        version, page = super().current()
        script = f"<script>{self.first if self.asked == 1 else self.after}</script></body>"
        return version, re.sub(rb"<meta http-equiv=[^>]*>", b"", page).replace(b"</body>", script.encode())

    def grow(self, run: RunDir) -> None:
        append_line(run.events, {"time": 1.8e9, "event": "fault", "step": 1, "rank": 0, "why": "new"})


def _dom_of(report: ServedReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A served page, half a minute after it was opened."""
    monkeypatch.setattr(serve, "_PAUSE", 0)
    with server_of(report, host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = serve.address_of(server, "127.0.0.1")
            return _chromium(tmp_path / "profile", "--virtual-time-budget=30000", "--dump-dom", url)
        finally:
            server.shutdown()
            thread.join()


def test_an_open_page_is_renewed_when_the_run_writes(run, tmp_path, monkeypatch) -> None:
    report = Growing(run, ())
    report.first = "dispatchEvent(new PointerEvent('pointerdown', { button: 2 }));"  # of which a menu takes the end
    dom = _dom_of(report, tmp_path, monkeypatch)
    assert "<div>new</div>" in dom
    assert 'class="status failed"' in dom
    assert 'id="unrenewed" role="status" hidden=""></p>' in dom


class Handled(Growing):
    """A report that a viewer has handled, before rows of results and an earlier grid come to it."""

    first = """
const slider = document.querySelector("#grids input");
slider.value = 1;
slider.oninput();
slider.focus();
const packages = [...document.querySelectorAll("details")].find((each) => each.textContent.startsWith("Packages"));
packages.open = true;
document.getElementById("events").scrollIntoView();
scrollBy(0, 100);
"""
    after = """
const opened = [...document.querySelectorAll("details[open] > summary")].map((each) => each.textContent);
const shown = document.querySelector("#grids figure:not([hidden]) figcaption").textContent;
const count = document.querySelectorAll("#grids figure, details").length;
const place = Math.round(document.getElementById("events").getBoundingClientRect().top);
document.title = `${opened} | ${shown} | ${document.activeElement.type} | ${place} | ${count}`;
"""

    def grow(self, run: RunDir) -> None:
        shutil.copy(run.samples / "step-000000000.png", run.samples / "step-000000050.png")
        for step in range(1, MOST_ROWS + 2):
            write_evaluation(run, step=step, nfe=1, values=(9.0,))


def test_a_renewed_page_is_as_its_viewer_left_it(run, tmp_path, monkeypatch) -> None:
    dom = _dom_of(Handled(run, ()), tmp_path, monkeypatch)
    assert "<title>Packages at the last start | step 100 | range | -100 | 9</title>" in dom  # 4 grids, 5 that fold


class Leaving(Growing):
    """A report whose run goes away."""

    def grow(self, run: RunDir) -> None:
        run.root.rename(run.root.with_name("elsewhere"))


def test_a_page_that_can_not_be_renewed_says_since_when_and_why(run, tmp_path, monkeypatch) -> None:
    dom = _dom_of(Leaving(run, ()), tmp_path, monkeypatch)
    assert re.search(r"Not renewed since [0-9:]+[^<]*: [^<]*a_run: no such run</p>", dom)
    assert 'class="status finished"' in dom


class Used(Growing):
    """A report in which a viewer selects text for a while, then holds a button, and notes why it is not renewed."""

    first = """
const line = document.getElementById("unrenewed");
const reasons = new Set();
new MutationObserver(() => {
  reasons.add(line.textContent.split(": ")[1]);
  sessionStorage.setItem("reasons", [...reasons]);
}).observe(line, { childList: true });
getSelection().selectAllChildren(document.querySelector("h1"));
setTimeout(() => {
  getSelection().empty();
  dispatchEvent(new PointerEvent("pointerdown", { button: 0 }));
}, 8000);
setTimeout(() => dispatchEvent(new PointerEvent("pointerup")), 16000);
"""
    after = "document.title = sessionStorage.getItem('reasons');"


def test_a_page_is_not_renewed_while_text_is_selected_or_a_button_is_held(run, tmp_path, monkeypatch) -> None:
    dom = _dom_of(Used(run, ()), tmp_path, monkeypatch)
    assert "<title>text is selected,a button is held</title>" in dom
    assert "<div>new</div>" in dom
