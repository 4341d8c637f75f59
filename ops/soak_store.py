"""Runs an object store on this machine that goes away again and again, as real ones do."""

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cmscale.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
if TYPE_CHECKING:
    from fault_proxy import FaultProxy

BUCKET = "soak"
PAUSE_SECONDS = (1.0, 8.0)
OUTAGE_SECONDS = (0.5, 12.0)


@dataclass
class Outages:
    """Takes a store off its port for random times, in a thread, as long as the block runs that it is entered for.

    Meanwhile shards are missing in the cache, so that training needs the store, too.

    Attributes:
        lengths: The seconds of each outage so far.
    """

    proxy: "FaultProxy"
    random: random.Random
    cache: Path
    lengths: list[float] = field(default_factory=list)

    def __enter__(self) -> "Outages":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="outages", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self.random.uniform(*PAUSE_SECONDS)):
            self.proxy.away()
            began = time.monotonic()
            for shard in self.cache.rglob("*.tar"):
                with suppress(FileNotFoundError):
                    shard.unlink()
            self._stop.wait(self.random.uniform(*OUTAGE_SECONDS))
            self.proxy.back()
            self.lengths.append(time.monotonic() - began)


@contextmanager
def store() -> Iterator["FaultProxy"]:
    """A store with an empty bucket, which the environment of this process names while the block runs.

    Raises:
        UserError: the packages of the tests are missing.
    """
    try:
        import boto3.session
        from fault_proxy import FaultProxy
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise UserError(f"--outages: needs the packages of the tests ({error}); pip install -e .[test]") from None
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "soak", "AWS_SECRET_ACCESS_KEY": "soak", "AWS_DEFAULT_REGION": "us-east-1"}
    with FaultProxy(f"http://{host}:{port}") as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        boto3.session.Session().client("s3").create_bucket(Bucket=BUCKET)
        yield proxy
    server.stop()
