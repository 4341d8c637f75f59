"""Downloads files from S3 in parts: each is asked for patiently by itself."""

import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from cmscale.io import traffic
from cmscale.io.patience import GivenUp
from cmscale.io.protocol import ArrivedChanged
from cmscale.io.s3_errors import LONGEST_ERROR_DOCUMENT, code_of, refuse_error_document

PART_BYTES = 8 << 20
_THREADS = 10
_TRIES = 4  # of an object that is replaced meanwhile, or of which parts arrive cut
_CHUNK_BYTES = 1 << 20


class Ask(Protocol):
    """Sends a request until the storage answers or it is given up, with errors explained."""

    def __call__(self, key: str, call: Callable[[Any], Any], *, given_up: threading.Event | None = None) -> Any: ...


def download_in_parts(ask: Ask, key: str, path: Path, **names: str) -> None:
    """Downloads an object to a file, which appears when it is complete.

    Args:
        ask: How requests are sent.
        names: Arguments of every request: Bucket, Key and the like.

    Raises:
        ArrivedChanged: each of several times a part is shorter than the server says, or the object is replaced.
        FileNotFoundError, UserError, ConnectionError, OSError: from the storage and the file.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # process ids of containers are alike
    try:
        for attempt in range(_TRIES):
            try:
                with staged.open("wb") as file, traffic.attempt() as count:
                    _download_once(ask, key, _Parts(file.fileno(), key, names, count))
            except ArrivedChanged:
                if attempt == _TRIES - 1:
                    raise
            else:
                staged.replace(path)
                return
    finally:
        staged.unlink(missing_ok=True)


def _download_once(ask: Ask, key: str, parts: "_Parts") -> None:
    total = ask(key, lambda client: parts.get(client, 0))
    offsets = range(PART_BYTES, total, PART_BYTES)
    if not offsets:
        return
    of_thread = {"initializer": traffic.adopt, "initargs": (traffic.current(),)}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="download", **of_thread) as threads:
        futures = [
            threads.submit(ask, key, lambda client, at=at: parts.get(client, at), given_up=parts.given_up)
            for at in offsets
        ]
        try:
            for future in futures:
                future.result()
        except BaseException:
            parts.given_up.set()  # else one that waits for the storage would be waited for
            threads.shutdown(cancel_futures=True)
            raise


class _Parts:
    """Writes parts of one object to a file."""

    def __init__(self, descriptor: int, key: str, names: dict[str, str], count: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._key = key
        self._names = names
        self._count = count
        self._tag: str | None = None
        self.given_up = threading.Event()

    def get(self, client: Any, offset: int) -> int:
        """Fetches the part at `offset`. Returns up to where the object is to be fetched in parts: its length.

        A server that knows no parts sends all at once.
        """
        answer = self._ask(client, offset)
        tag = answer.get("ETag", "")
        if self._tag not in (None, tag):
            raise ArrivedChanged(f"{self._key}: was replaced while it was downloaded")
        self._tag = tag
        with traffic.attempt(self._count) as moved:
            return self._take(answer, offset, moved)

    def _take(self, answer: Any, offset: int, moved: Callable[[int], None]) -> int:
        """Writes what comes to the file, and checks that it is the part that was asked for."""
        count, head = 0, b""
        for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
            if self.given_up.is_set():
                raise GivenUp
            self._write(chunk, offset + count)
            count += len(chunk)
            moved(len(chunk))
            head = chunk if count == len(chunk) else head
        if count <= LONGEST_ERROR_DOCUMENT:
            refuse_error_document(head, self._key)
        said = answer.get("ContentRange")  # bytes FIRST-LAST/LENGTH
        if said is None and not offset:
            return 0
        if said is None:
            raise ArrivedChanged(f"{self._key}: the server sends parts at times, and at times all at once")
        span, _, total = said.removeprefix("bytes ").partition("/")
        first, _, last = span.partition("-")
        if int(first) != offset or count != int(last) + 1 - offset:
            raise ArrivedChanged(f"{self._key}: {count} bytes arrived at {offset}, where the server has {said}")
        return int(total)

    def _write(self, chunk: bytes, at: int) -> None:
        left = memoryview(chunk)
        while left:  # a disk that fills up takes a part first
            written = os.pwrite(self._descriptor, left, at)
            left, at = left[written:], at + written

    def _ask(self, client: Any, offset: int) -> Any:
        from botocore.exceptions import ClientError

        try:
            return client.get_object(**self._names, Range=f"bytes={offset}-{offset + PART_BYTES - 1}")
        except ClientError as error:
            if code_of(error) not in ("InvalidRange", "416"):
                raise
            if offset:
                raise ArrivedChanged(f"{self._key}: was replaced by a shorter one while it was downloaded") from error
            return client.get_object(**self._names)  # an empty object has no part
