"""Runs an S3 server for benchmarks, in another process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def s3_server() -> Iterator[str]:
    """Runs an S3 server (moto). Yields the URL of a bucket in it."""
    code = (
        "from moto.server import ThreadedMotoServer as S; import sys\n"
        "s = S(ip_address='127.0.0.1', port=0, verbose=False); s.start()\n"
        "print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{int(process.stdout.readline())}")
        from boto3.session import Session

        Session().client("s3").create_bucket(Bucket="bench")
        yield "s3://bench"
    finally:
        process.kill()
        process.wait()
