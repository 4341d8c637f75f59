"""Stores objects in an S3 bucket, by boto3."""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from cmscale.errors import UserError
from cmscale.io.durable import explained
from cmscale.io.protocol import ArrivedChanged, Entry

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0  # without an answer, per attempt
_EXISTS = ("PreconditionFailed", "ConditionalRequestConflict", "412")


@lru_cache(maxsize=1)
def _service_models() -> Any:
    """botocore's description of the services: parsed once per process, not once per client."""
    from botocore.loaders import create_loader

    return create_loader()


class S3Storage:
    """A prefix in an S3 bucket. boto3 finds credentials, region and endpoint (AWS_ENDPOINT_URL) as it always does."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None

    @classmethod
    def from_url(cls, url: str) -> "S3Storage":
        """Opens `s3://BUCKET/PREFIX`. Raises UserError if there is no bucket."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"{url}: an S3 URL needs a bucket, s3://BUCKET/PREFIX")
        return cls(bucket, prefix.strip("/"))

    @property
    def client(self) -> Any:
        """boto3's client, made at first use; a forked or unpickled storage makes its own."""
        if self._client is None or self._client[0] != os.getpid():
            from boto3.session import Session
            from botocore.config import Config as ClientConfig
            from botocore.session import get_session

            # "adaptive" would delay all requests of a client for a minute after a few answers of 503.
            settings = ClientConfig(
                retries={"mode": "standard", "total_max_attempts": 6},
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_READ_SECONDS,
            )
            with self._explained(""):
                core = get_session()
                core.register_component("data_loader", _service_models())
                self._client = (os.getpid(), Session(botocore_session=core).client("s3", config=settings))
        return self._client[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def join(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turns botocore's errors into FileNotFoundError, ConnectionError or UserError."""
        from boto3.exceptions import RetriesExceededError, S3UploadFailedError
        from botocore import exceptions as boto

        try:
            yield
        except (boto.NoCredentialsError, boto.PartialCredentialsError):
            raise UserError(f"{self.url}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, RetriesExceededError) as error:
            raise ConnectionError(f"{self.url}: the S3 server does not answer, or not completely ({error})") from error
        except boto.FlexibleChecksumError as error:
            raise ArrivedChanged(f"{self.join(key)}: arrived with a wrong checksum ({error})") from error
        except (boto.ParamValidationError, boto.NoRegionError, boto.ProfileNotFound, ValueError) as error:
            raise UserError(f"{self.url}: {error}") from None
        except S3UploadFailedError as error:
            if isinstance(error.__context__, boto.ClientError):
                self._raise_client_error(error.__context__, key)
            raise ConnectionError(f"{self.join(key)}: upload failed ({error})") from error
        except boto.ClientError as error:
            self._raise_client_error(error, key)

    def _raise_client_error(self, error: Any, key: str) -> None:
        code = error.response["Error"].get("Code", "")
        match code:
            case "NoSuchBucket":
                raise UserError(f"{self.url}: no bucket {self.bucket!r} there; create it first") from None
            case "NoSuchKey" | "404" | "NotFound":
                raise FileNotFoundError(errno.ENOENT, "no such object", self.join(key)) from error
            case "AccessDenied" | "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "403" | "InvalidClientTokenId":
                advice = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                raise UserError(f"{self.join(key)}: S3 refuses the credentials ({code}); {advice}") from None
        raise ConnectionError(f"{self.join(key)}: S3 answered {code}: {error}") from error

    def read(self, key: str) -> bytes:
        with self._explained(key):
            return self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def read_if_present(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def write_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._explained(key):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if error.response["Error"].get("Code") not in _EXISTS:
                    raise
                return self.read_if_present(key) == data  # a retried PUT may find what its first attempt wrote
        return True

    def upload(self, key: str, path: Path) -> None:
        with self._explained(key):
            self.client.upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._explained(key):
                self.client.download_file(self.bucket, self._key(key), str(path))  # boto3 renames when complete

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._explained(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"][len(self.prefix) + 1 :] if self.prefix else item["Key"]
                    yield Entry(key, item["Size"], item["ETag"])

    def delete(self, key: str) -> None:
        with self._explained(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def check_writable(self, key: str) -> None:
        """Begins a multipart upload and aborts it: that needs the permission to write, and no object appears."""
        from botocore.exceptions import ClientError

        with self._explained(key):
            begun = self.client.create_multipart_upload(Bucket=self.bucket, Key=self._key(key))
            with contextlib.suppress(ClientError):  # who may write need not be allowed to abort
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=self._key(key), UploadId=begun["UploadId"])

    def abort_uploads(self) -> int:
        """Ends unfinished multipart uploads under this prefix: no listing shows their parts, and they are paid for."""
        with self._explained(""):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=f"{self.prefix}/" if self.prefix else ""
            )
            unfinished = [upload for page in pages for upload in page.get("Uploads", [])]
            for upload in unfinished:
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(unfinished)

    def local_path(self, key: str) -> None:  # noqa: ARG002
        return None

    def sub(self, prefix: str) -> "S3Storage":
        return S3Storage(self.bucket, self._key(prefix).strip("/"))
