"""The report in a real browser: it renders, nothing overflows, and both colour schemes are legible."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folder import write_run

from cmscale.report import build_report
from cmscale.runs.folder import RunDir

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


def test_nothing_is_wider_than_the_window(run, tmp_path) -> None:
    page = build_report(run)
    probe = page.with_name("probe.html")
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    probe.write_text(page.read_text().replace("</body>", script))
    for width in (1200, 600):
        dom = _chromium(tmp_path / "profile", f"--window-size={width},900", "--dump-dom", probe.as_uri())
        found = re.search(r"<title>(\d+) of (\d+)</title>", dom)
        assert found is not None
        assert int(found[1]) <= int(found[2])
