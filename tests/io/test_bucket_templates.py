"""The templates for a bucket: the policy allows exactly what the storage does, and S3 accepts the lifecycle."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3.session
import pytest
from botocore.exceptions import ClientError

from cmscale.io.s3 import S3Storage

TEMPLATES = Path(__file__).parents[2] / "ops" / "templates"


@pytest.fixture
def strict_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server of its own, which can enforce the policies of its users."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    endpoint = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "root", "SECRET_ACCESS_KEY": "root"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield endpoint
    server.terminate()
    server.communicate()


def test_a_user_with_the_bucket_policy_can_do_what_storage_does_and_nothing_else(
    strict_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = boto3.session.Session()
    iam, s3 = session.client("iam"), session.client("s3")
    for bucket in ("models", "another"):
        s3.create_bucket(Bucket=bucket)
    iam.create_user(UserName="researcher")
    policy = (TEMPLATES / "bucket_policy.json").read_text().replace("BUCKET", "models")
    iam.put_user_policy(UserName="researcher", PolicyName="cmscale", PolicyDocument=policy)
    key = iam.create_access_key(UserName="researcher")["AccessKey"]
    s3.create_multipart_upload(Bucket="models", Key="runs/left")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    urllib.request.urlopen(
        urllib.request.Request(
            f"{strict_server}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
    )

    storage = S3Storage("models", "runs")
    assert storage.abort_uploads(lambda key: True) == 1
    assert storage.write_if_absent("manifest.json", b"{}")
    assert not storage.write_if_absent("manifest.json", b"[]")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(20 << 20))  # in parts
    storage.upload("large", large)
    storage.download("large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == large.read_bytes()
    assert storage.read_if_present("nothing") is None
    assert sorted(entry.key for entry in storage.list()) == ["large", "manifest.json"]
    storage.delete("large")

    own = boto3.session.Session().client("s3")
    for forbidden in (
        lambda: own.list_objects_v2(Bucket="another"),
        lambda: own.put_object(Bucket="another", Key="k", Body=b""),
        lambda: own.delete_bucket(Bucket="models"),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            forbidden()


def test_the_lifecycle_ends_uploads_that_were_killed(s3: str) -> None:
    client, bucket = boto3.session.Session().client("s3"), s3.removeprefix("s3://")
    lifecycle = json.loads((TEMPLATES / "bucket_lifecycle.json").read_text())
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=lifecycle)
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
