"""A data format and an image source, added as ops/adding_a_format.md describes, are prepared, verified and read."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import encoded_images

from cmscale.errors import UserError
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import read_dataset_manifest

pytestmark = pytest.mark.long

CHECKOUT = Path(__file__).resolve().parents[2]
GUIDE = CHECKOUT / "ops" / "adding_a_format.md"
_BLOCK = re.compile(r"<!-- new file: (?P<path>\S+) -->\n```python\n(?P<text>.*?)```", re.DOTALL)

USE = """
import json, os, sys
from pathlib import Path
from cmscale.data import read_images
from cmscale.data.samples import Samples
from data_prep import prepare, verify

out = sys.argv[2]
command = ["--source", sys.argv[1], "--out", out, "--format", "lines", "--image-size", "16"]
assert prepare.main([*command, "--samples-per-shard", "3", "--workers", "2"]) == 0
before = {path.name: path.read_bytes() for path in Path(out).iterdir()}
assert verify.main([out]) == 0
Path(out, "lines-00001.jsonl").write_bytes(b"")
Path(out, "lines.json").unlink()
assert verify.main([out]) == 1
assert verify.main([out, "--repair"]) == 0
assert {path.name: path.read_bytes() for path in Path(out).iterdir()} == before
read = [(key, image.tolist()) for image, key in read_images(out)]
reference = out + "-mds"
command[3], command[5] = reference, "mds"
assert prepare.main([*command, "--samples-per-shard", "3", "--workers", "1"]) == 0
print(json.dumps({
    "keys": [key for key, _ in read],
    "same": read == [(key, image.tolist()) for image, key in read_images(reference)],
    "format": Samples(out).manifest.format,
}))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages in which the guide has been carried out."""
    root = tmp_path_factory.mktemp("checkout")
    for package in ("cmscale", "data_prep"):
        shutil.copytree(CHECKOUT / package, root / package)  # with what Python compiled, which saves seconds
    blocks = list(_BLOCK.finditer(GUIDE.read_text()))
    assert [block["path"] for block in blocks] == ["cmscale/data/formats/lines.py", "data_prep/sources/npz.py"]
    for block in blocks:
        (root / block["path"]).write_text(block["text"])
    return root


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_one_file_adds_a_format_and_one_file_adds_a_source(checkout: Path, tmp_path: Path) -> None:
    samples = {name: np.frombuffer(data, np.uint8) for name, data in encoded_images(7).items()}
    np.savez(tmp_path / "images.npz", **samples)
    done = run(checkout, "-c", USE, f"npz:{tmp_path}/images.npz", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"keys": sorted(samples), "same": True, "format": "lines"}
    # The checkout without the new file refuses the data set, and names the formats that it has.
    with pytest.raises(UserError, match=r"manifest.json: .*'lines' is not a data set format .*mds, webdataset"):
        read_dataset_manifest(open_storage(tmp_path / "out"))


@pytest.mark.parametrize(("path", "name"), [("cmscale/data/formats", "FORMAT"), ("data_prep/sources", "KIND")])
def test_a_file_that_defines_nothing_is_an_error_that_names_what_is_missing(
    checkout: Path, tmp_path: Path, path: str, name: str
) -> None:
    empty = checkout / path / "empty.py"
    empty.write_text("")
    try:
        prepare = ["data_prep/prepare.py", "--source", f"folder:{tmp_path}", "--out", str(tmp_path / "out")]
        (tmp_path / "a.png").write_bytes(b"")
        done = run(checkout, *prepare, "--format", "empty")
    finally:
        empty.unlink()
    assert done.returncode != 0
    assert re.search(rf"{path.replace('/', '.')}\.empty must define {name}", done.stderr)
