"""Starts the testbed that the tests of this folder share: a real Slurm with two nodes on this machine."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TESTBED = CHECKOUT / "ops" / "slurm_testbed"


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The slurm.conf of the testbed, which runs until the end of the session."""
    if os.geteuid() != 0:
        pytest.skip("the Slurm testbed needs root")
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("no Slurm here (apt-get install slurmctld slurmd slurm-client munge)")
    folder = tmp_path_factory.mktemp("testbed")
    environment = {**os.environ, "TESTBED_DIR": str(folder)}
    small = folder / "small"
    small.mkdir()  # mounted first, so that all nodes have it
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small], capture_output=True, check=False)
    up = subprocess.run([TESTBED / "up.sh", "2"], env=environment, capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stderr
    yield folder / "slurm.conf"
    subprocess.run(["umount", "-l", small], capture_output=True, check=False)
    subprocess.run([TESTBED / "down.sh"], env=environment, check=True)


@pytest.fixture
def slurm(testbed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The testbed's slurm.conf, set in the environment; the queue is empty before and after the test."""
    monkeypatch.setenv("SLURM_CONF", str(testbed))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    subprocess.run(["scancel", "--user=root"], check=True)  # jobs that a module's fixture may have left
    yield testbed
    subprocess.run(["scancel", "--user=root"], check=True)


@pytest.fixture
def small(slurm: Path) -> Iterator[Path]:
    """A folder of 64 MiB that all nodes share, empty before and after the test."""
    folder = slurm.parent / "small"
    if not folder.is_mount():
        pytest.skip("a small disk can't be mounted here")
    yield folder
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
