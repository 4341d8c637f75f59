"""Uploads large files to S3 in parts: each is asked for patiently by itself, and compared by the server."""

import base64
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from cmscale.io import traffic
from cmscale.io.protocol import ArrivedChanged
from cmscale.io.s3_errors import NoSuchUpload

PART_BYTES = 16 << 20
MOST_PARTS = 9000  # S3 takes 10,000
_THREADS = 4
_TRIES = 3


class Ask(Protocol):
    """Sends a request, with errors explained; a patient one until the storage answers, or it is given up."""

    def __call__(
        self,
        key: str,
        call: Callable[[Any], Any],
        *,
        patient: bool = True,
        given_up: threading.Event | None = None,
    ) -> Any: ...


def md5(data: bytes) -> str:
    """A body's MD5 as the header Content-MD5 has it: servers of all kinds refuse a body that does not match."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def upload_in_parts(ask: Ask, key: str, path: Path, **names: str) -> None:
    """Uploads a file in parts; the object appears when all of them have arrived.

    Args:
        ask: How requests are sent.
        names: Arguments of every request: Bucket, Key and the like.

    Raises:
        NoSuchUpload: somebody ended the upload each of several times.
        ArrivedChanged: the server gets other bytes each time.
        UserError, ConnectionError, OSError: from the storage and the file.
    """
    for attempt in range(_TRIES):
        try:
            with traffic.attempt() as count:
                _upload_once(ask, key, path, names, count)
        except NoSuchUpload:
            if attempt == _TRIES - 1:
                raise
        else:
            return


def _upload_once(ask: Ask, key: str, path: Path, names: dict[str, str], count: Callable[[int], None]) -> None:
    begun = ask(key, lambda client: client.create_multipart_upload(**names))["UploadId"]
    this, given_up = {**names, "UploadId": begun}, threading.Event()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = max(PART_BYTES, -(-size // MOST_PARTS))

            def send(number: int) -> dict[str, Any]:
                data = os.pread(file.fileno(), length, (number - 1) * length)
                tag = _send_part(ask, key, data, this | {"PartNumber": number}, given_up)
                count(len(data))
                return {"PartNumber": number, "ETag": tag}

            of_thread = {"initializer": traffic.adopt, "initargs": (traffic.current(),)}
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="upload", **of_thread) as threads:
                futures = [threads.submit(send, number) for number in range(1, -(-size // length) + 1)]
                try:
                    parts = [future.result() for future in futures]
                except BaseException:
                    given_up.set()  # else one that waits for the storage would be waited for
                    threads.shutdown(cancel_futures=True)
                    raise
        _complete(ask, key, parts, this, size=size, names=names)
    except BaseException:
        with contextlib.suppress(Exception):  # it may not be allowed, and the next start ends it, too
            ask(key, lambda client: client.abort_multipart_upload(**this), patient=False)
        raise


def _send_part(ask: Ask, key: str, data: bytes, this: dict[str, Any], given_up: threading.Event) -> str:
    def send(client: Any) -> Any:
        return client.upload_part(**this, Body=data, ContentMD5=md5(data))

    for attempt in range(_TRIES):
        try:
            return ask(key, send, given_up=given_up)["ETag"]
        except ArrivedChanged:
            if attempt == _TRIES - 1:
                raise
    raise AssertionError


def _complete(
    ask: Ask, key: str, parts: list[dict[str, Any]], this: dict[str, Any], *, size: int, names: dict[str, str]
) -> None:
    try:
        ask(key, lambda client: client.complete_multipart_upload(**this, MultipartUpload={"Parts": parts}))
    except NoSuchUpload:  # an earlier attempt was carried out, but its answer got lost
        with contextlib.suppress(FileNotFoundError):
            if ask(key, lambda client: client.head_object(**names))["ContentLength"] == size:
                return
        raise
