"""Defines fixtures for tests in several folders: a loopback S3 server with a new bucket per test."""

import gc
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from hypothesis import settings

from cmscale.io import interrupts, patience
from cmscale.io.published import INCEPTION, VGG16, hub_checkpoints
from cmscale.io.settings import StorageSettings, use_settings

settings.register_profile("steady", deadline=None, derandomize=True)  # machines differ in speed
settings.load_profile("steady")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TERM"] = "xterm"
for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
    os.environ.pop(name, None)  # what the terminal of whoever runs the tests can do changes no test
# Nor do a job in which they run, its launcher, credentials, and a site file.
_OTHERS = ("AWS_", "LOCAL_", "MASTER_", "OMPI_", "PMI_", "RANK", "SALLOC_", "SBATCH_", "SLURM_", "WANDB_", "WORLD_SIZE")
for name in [name for name in os.environ if name.startswith(_OTHERS)]:
    del os.environ[name]
os.environ["CMSCALE_SITE"] = ""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell, whose children ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector, which runs often in tests, does not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fetched files go to a folder of the test session, never to the user's cache."""
    os.environ["CMSCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def published_weights_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Files with the names of published weights are in torch hub's cache: no test asks the internet for them."""
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))
    hub_checkpoints().mkdir(parents=True)
    for published in (INCEPTION, VGG16):
        (hub_checkpoints() / published.name).write_bytes(b"not the weights")


@pytest.fixture(autouse=True)
def storage_as_in_a_new_process() -> Iterator[None]:
    """What a test says about storages, and the waits in it, end with it."""
    yield
    use_settings(StorageSettings())
    patience.forget_waits()


@pytest.fixture(autouse=True)
def signals_as_in_a_new_process() -> Iterator[None]:
    """Handlers that a test installs, as a training does, and the signals that they note, end with it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    interrupts.received.clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a moto server on a free loopback port; it ends with the test session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_client(s3_server: str) -> Any:
    """A client of the server, made once, as that takes a while."""
    import boto3

    names = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    return boto3.session.Session().client("s3", endpoint_url=s3_server, **names)


@pytest.fixture
def s3(s3_server: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL `s3://BUCKET` of a fresh bucket; endpoint and credentials are in the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def proxy(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy between the client and the bucket of `s3`, to which tests add faults."""
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_fixtures import COUNT, encoded_images, write_lmdb

    return write_lmdb(tmp_path_factory.mktemp("lsun") / "photo_train_lmdb", encoded_images(COUNT))


@pytest.fixture(scope="session")
def sets(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from data_fixtures import FORMATS, make

    folder = tmp_path_factory.mktemp("sets")
    return {format: make(source, str(folder / format), format) for format in FORMATS}


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine anything may take the seconds after which a log gets a line."""
    monkeypatch.setattr("cmscale.io.counting.FIRST_SECONDS", float("inf"))
    monkeypatch.setattr("launchers.try_inputs._LONG_SECONDS", None)
