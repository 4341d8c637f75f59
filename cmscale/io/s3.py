"""Stores objects in an S3 bucket, by boto3."""

import contextlib
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cmscale.errors import UserError
from cmscale.io import s3_upload, traffic
from cmscale.io.durable import explained
from cmscale.io.patience import patiently
from cmscale.io.protocol import ArrivedChanged, Entry, StorageAway
from cmscale.io.s3_client import make_client
from cmscale.io.s3_delete import delete_in_batches
from cmscale.io.s3_download import download_in_parts
from cmscale.io.s3_errors import (
    ClockSkew,
    Expired,
    NoSuchUpload,
    Unsupported,
    code_of,
    explained_by_s3,
    refuse_error_document,
)
from cmscale.io.s3_upload import md5, upload_in_parts
from cmscale.io.settings import storage_settings

T = TypeVar("T")

_EXISTS = ("PreconditionFailed", "412")
_IN_ONE_PART = 2  # times the size of a part
_READS = 4  # of one object whose body does not fit its ETag
_MD5 = re.compile("[0-9a-f]{32}")
_answered: set[str] = set()  # buckets of which this process has had an answer


class S3Storage:
    """A prefix in an S3 bucket. Requests that are not answered are repeated patiently."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None

    @classmethod
    def from_url(cls, url: str) -> "S3Storage":
        """Opens `s3://BUCKET/PREFIX`; slashes around the prefix do not count.

        Raises:
            UserError: there is no bucket, or a part of the prefix is empty, `.` or `..`: to S3 these are names, which
                other programs write and read as other ones.
        """
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"{url}: an S3 URL needs a bucket, s3://BUCKET/PREFIX")
        parts = prefix.strip("/").split("/") if prefix.strip("/") else []
        if wrong := next((part for part in parts if part in (".", "..")), None):
            raise UserError(f"{url}: an S3 URL has no part {wrong}; write it without")
        if "" in parts:
            plain = "/".join(filter(None, (bucket, *parts)))
            raise UserError(f"{url}: an S3 URL has single slashes; write s3://{plain}")
        return cls(bucket, "/".join(parts))

    @property
    def client(self) -> Any:
        """boto3's client, made at first use; a forked or unpickled storage makes its own."""
        made = self._client  # which another thread may replace
        if made is None or made[0] != os.getpid():
            made = self._client = (os.getpid(), make_client())
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def join(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _at(self, key: str) -> dict[str, str]:
        """The arguments that name an object in every request."""
        return {"Bucket": self.bucket, "Key": self._key(key), **_payer()}

    def _ask(
        self, key: str, call: Callable[[Any], T], *, patient: bool = True, given_up: threading.Event | None = None
    ) -> T:
        """Sends a request; a patient one until the storage answers it, or it is given up."""

        def asked() -> T:
            with explained_by_s3(self.url, self.join(key)):
                return call(self.client)

        def once() -> T:
            try:
                try:
                    found = asked()
                except Expired:
                    self._client = None  # the next one reads the files again, which somebody may have renewed
                    found = asked()
            except ClockSkew as error:
                if self.bucket not in _answered:  # the clock was wrong from the start
                    raise
                raise StorageAway(str(error)) from error
            _answered.add(self.bucket)
            return found

        return patiently(once, given_up=given_up) if patient else once()

    def read(self, key: str) -> bytes:
        before: bytes | None = None
        for _ in range(_READS):
            body, tag = self._ask(key, lambda client: self._get(client, key))
            # An ETag is the MD5 of most objects. Where it is not, two bodies that are equal show that nothing changed.
            if not _MD5.fullmatch(tag) or body == before or hashlib.md5(body, usedforsecurity=False).hexdigest() == tag:
                return body
            before = body
        raise ArrivedChanged(f"{self.join(key)}: arrived changed, each of {_READS} times otherwise")

    def _get(self, client: Any, key: str) -> tuple[bytes, str]:
        """An object's body and its ETag."""
        answer = client.get_object(**self._at(key))
        body = answer["Body"].read()
        refuse_error_document(body, self.join(key))
        return body, answer.get("ETag", "").strip('"')

    def read_if_present(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        self._ask(key, lambda client: client.put_object(**self._at(key), Body=data, ContentMD5=md5(data)))

    def write_if_absent(self, key: str, data: bytes) -> bool:
        if not storage_settings().conditional_writes:
            return self._write_where_nothing_is_seen(key, data)
        try:
            return self._ask(key, lambda client: self._put_if_absent(client, key, data))
        except Unsupported as error:
            raise UserError(
                f"{error}, if it is conditional (If-None-Match); to do without, set storage.conditional_writes=false, "
                "and never start one run or preparation twice at the same moment"
            ) from None

    def _put_if_absent(self, client: Any, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        try:
            client.put_object(**self._at(key), Body=data, ContentMD5=md5(data), IfNoneMatch="*")
        except ClientError as error:
            if code_of(error) not in _EXISTS:
                raise
            try:
                return self._get(client, key)[0] == data  # what a lost first attempt wrote
            except ClientError as absent:
                if code_of(absent) not in ("NoSuchKey", "404"):
                    raise
                raise StorageAway(f"{self.join(key)}: is there and is not there ({code_of(error)})") from error
        return True

    def _write_where_nothing_is_seen(self, key: str, data: bytes) -> bool:
        present = self.read_if_present(key)
        if present is None:
            self.write(key, data)
            present = self.read(key)
        return present == data

    def upload(self, key: str, path: Path) -> None:
        if path.stat().st_size <= _IN_ONE_PART * s3_upload.PART_BYTES:
            data = path.read_bytes()
            self.write(key, data)
            traffic.moved(len(data))
        else:
            upload_in_parts(self._ask, key, path, **self._at(key))

    def download(self, key: str, path: Path) -> None:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            download_in_parts(self._ask, key, path, **self._at(key))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages(prefix):
            for item in page.get("Contents", []):
                if item["Key"].endswith("/"):  # an empty object, by which consoles and mounts show a folder
                    continue
                yield Entry(self._relative(item["Key"]), item["Size"], item["ETag"])

    def folders(self, prefix: str = "") -> "list[str]":
        pages = self._pages(prefix, Delimiter="/")
        found = (self._relative(each["Prefix"]) for page in pages for each in page.get("CommonPrefixes", []))
        return sorted({name.rstrip("/") for name in found})

    def _pages(self, prefix: str, **more: str) -> Iterator[dict[str, Any]]:
        """The answers of a listing."""
        at = {"Bucket": self.bucket, "Prefix": self._key(prefix), **_payer(), **more}
        while True:
            page = self._ask(prefix, lambda client: client.list_objects_v2(**at))
            yield page
            if not page.get("IsTruncated"):
                return
            if not page.get("NextContinuationToken"):
                raise UserError(f"{self.url}: the store's listing has more, and does not say how to ask for it")
            at["ContinuationToken"] = page["NextContinuationToken"]

    def _relative(self, key: str) -> str:
        return key[len(self.prefix) + 1 :] if self.prefix else key

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(key, lambda client: client.delete_object(**self._at(key)))

    def delete_all(self, keys: Iterable[str]) -> None:
        at = {"Bucket": self.bucket, **_payer()}
        for key in delete_in_batches(self._ask, keys, full=self._key, **at):
            self.delete(key)

    def check_writable(self, key: str) -> None:
        """Begins a multipart upload and aborts it: that needs the permission to write, and no object appears."""
        begun = self._ask(key, lambda client: client.create_multipart_upload(**self._at(key)))
        with contextlib.suppress(UserError, OSError):  # who may write need not be allowed to abort
            self._ask(key, lambda client: client.abort_multipart_upload(**self._at(key), UploadId=begun["UploadId"]))

    def abort_uploads(self, is_mine: Callable[[str], bool]) -> int:
        """Ends unfinished multipart uploads of own keys: no listing shows their parts, and they are paid for."""
        ended = 0
        try:
            for upload in tuple(self._unfinished()):
                key = self._relative(upload["Key"])
                if is_mine(key):
                    at = {**self._at(key), "UploadId": upload["UploadId"]}
                    with contextlib.suppress(NoSuchUpload):  # its process has ended it itself
                        self._ask(key, lambda client, at=at: client.abort_multipart_upload(**at))
                        ended += 1
        except StorageAway:
            raise
        except (UserError, OSError) as error:
            print(
                f"note: unfinished uploads below {self.url} can't be ended ({error}); a rule of the bucket can do it: "
                "ops/templates/bucket_lifecycle.json",
                file=sys.stderr,
            )
        return ended

    def _unfinished(self) -> Iterator[dict[str, str]]:
        at = {"Bucket": self.bucket, "Prefix": f"{self.prefix}/" if self.prefix else "", **_payer()}
        more: dict[str, str] = {}
        while True:
            page = self._ask("", lambda client, more=more: client.list_multipart_uploads(**at, **more))
            yield from page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def local_path(self, key: str) -> None:  # noqa: ARG002
        return None

    def sub(self, prefix: str) -> "S3Storage":
        return S3Storage(self.bucket, self._key(prefix).strip("/"))


def _payer() -> dict[str, str]:
    return {"RequestPayer": "requester"} if storage_settings().requester_pays else {}
