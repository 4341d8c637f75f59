"""Deletes many objects of S3 with few requests, and singly where a store takes no batches."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from cmscale.errors import UserError
from cmscale.io.protocol import StorageAway
from cmscale.io.s3_errors import AWAY
from cmscale.io.s3_upload import md5

BATCH = 1000  # S3 takes no more


class Ask(Protocol):
    """Sends a request until the storage answers, with errors explained."""

    def __call__(self, key: str, call: Callable[[Any], Any]) -> Any: ...


def send_md5_with_batches(client: Any) -> None:
    """Makes a client send a batch with its MD5, which all stores know, in place of boto3's newer checksum."""

    def add(params: dict[str, Any], **_: Any) -> None:
        params["headers"]["Content-MD5"] = md5(params["body"])
        params.get("context", {}).pop("checksum", None)

    client.meta.events.register_last("before-call.s3.DeleteObjects", add)


def delete_in_batches(ask: Ask, keys: Iterable[str], *, full: Callable[[str], str], **names: str) -> "list[str]":
    """Deletes objects, up to a thousand with a request. Returns those that are to be deleted singly.

    That is all that are left once the store refuses a batch as such: some know none, and some demand other checksums.

    Args:
        ask: How requests are sent.
        full: The whole key of an object in its bucket.
        names: Arguments of every request: Bucket and the like.

    Raises:
        UserError: the store says of objects that they can't be deleted, with status 200; the others of its batches are.
        StorageAway: from the storage.
    """
    left, refused = list(keys), {}
    while left:
        batch = left[:BATCH]
        try:
            found = ask(batch[0], lambda client, batch=batch: _delete(client, [full(key) for key in batch], names))
        except StorageAway:
            raise
        except (UserError, OSError):
            break
        refused.update(found)
        left = left[BATCH:]
    if refused:
        key, why = next(iter(refused.items()))
        raise UserError(
            f"{len(refused)} objects can't be deleted, first s3://{names['Bucket']}/{key}: {why}; allow s3:DeleteObject"
        )
    return left


def _delete(client: Any, keys: "list[str]", names: dict[str, str]) -> dict[str, str]:
    """Sends a batch. Returns what the store refuses to delete, and why."""
    request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    errors = client.delete_objects(Delete=request, **names).get("Errors", [])
    failed = {
        error.get("Key", "?"): (error.get("Code", ""), error.get("Message", ""))
        for error in errors
        if error.get("Code") not in ("NoSuchKey", "NoSuchVersion")
    }
    for key, (code, said) in failed.items():
        if code in AWAY:
            some = f"s3://{names['Bucket']}/{key}, one of {len(failed)} of {len(keys)} objects"
            raise StorageAway(f"{some}: was not deleted: {code} {said}")
    return {key: f"{code} {said}".strip() for key, (code, said) in failed.items()}
