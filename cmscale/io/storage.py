"""Owns bytes outside the process: one small `Storage` protocol over local folders and S3 (boto3)."""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from cmscale.errors import UserError

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0  # of silence, an attempt


@dataclass(frozen=True)
class Entry:
    """A stored object: its key relative to the storage's root, its size in bytes, and what changes when it does."""

    key: str
    size: int
    version: str = field(default="", compare=False)


class ArrivedChanged(ConnectionError):
    """What was read from a storage does not have the checksum that it was stored with."""


class Storage(Protocol):
    """A folder of objects. Keys are relative, parts joined by `/`. A write is seen whole or not at all."""

    url: str

    def join(self, key: str) -> str:
        """The object's full path or URL, for messages."""
        ...

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        ...

    def read_if_present(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is no such object."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Writes an object, durably, in place of any older one."""
        ...

    def write_if_absent(self, key: str, data: bytes) -> bool:
        """Writes an object unless one is there. Returns whether the object there now is `data`."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Copies a local file to `key`."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Copies an object to a local file, complete or not at all. Raises FileNotFoundError."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose keys start with `prefix`, in the order of their keys."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object; none there is no error."""
        ...

    def sub(self, prefix: str) -> "Storage":
        """The storage whose root is `prefix` in this one."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The path of an object, or of a prefix, on a local file system; None if it has none."""
        ...

    def abort_uploads(self) -> int:
        """Ends uploads that processes began and never completed. Returns their number."""
        ...


def open_storage(url: str | Path) -> Storage:
    """Opens `s3://bucket/prefix` or a local folder (which need not exist yet). Touches nothing.

    Raises:
        UserError: another scheme, or an S3 URL without a bucket.
    """
    text = str(url)
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"{text}: an S3 URL needs a bucket, s3://BUCKET/PREFIX")
        return S3Storage(bucket, prefix.strip("/"))
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", text):
        raise UserError(f"{text}: only local paths and s3:// are read and written")
    return LocalStorage(Path(text))


def open_parent(url: str | Path) -> tuple[Storage, str]:
    """The storage that holds the single object at `url`, and the object's key in it."""
    head, _, name = str(url).rstrip("/").rpartition("/")
    if not name or head in ("s3:/", "s3:"):
        raise UserError(f"{url}: names no file")
    return open_storage(head or ("/" if str(url).startswith("/") else ".")), name


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what an operating system refuses a user into one line."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                raise UserError(f"{path}: no space left on the device; free some or write elsewhere") from error
            case errno.EACCES | errno.EPERM | errno.EROFS:
                raise UserError(f"{path}: not allowed to write there ({error.strerror})") from error
            case errno.ENOTDIR | errno.EEXIST:
                raise UserError(f"{path}: a file is where a folder is needed") from error
        raise


@contextmanager
def local_copy(storage: Storage, key: str) -> Iterator[Path]:
    """A stored file as a local path: itself, or a copy that is removed afterwards. Raises FileNotFoundError."""
    if isinstance(storage, LocalStorage):
        if not (storage.root / key).is_file():
            raise FileNotFoundError(storage.join(key))
        yield storage.root / key
        return
    with tempfile.TemporaryDirectory(prefix="cmscale-") as folder:
        path = Path(folder) / "copy"
        storage.download(key, path)
        yield path


def replace_durably(path: Path, data: bytes) -> None:
    """Writes a file so that, after a crash at any moment, it holds the old bytes or the new ones."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where its file system can (some FUSE file systems cannot)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


class LocalStorage:
    """A folder on a file system that the process sees."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def join(self, key: str) -> str:
        return str(self.root / key)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def read_if_present(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise UserError(f"{self.root}: is a file, not a folder") from None

    def write(self, key: str, data: bytes) -> None:
        replace_durably(self.root / key, data)

    def write_if_absent(self, key: str, data: bytes) -> bool:
        path = self.root / key
        staged = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        replace_durably(staged, data)
        try:
            os.link(staged, path)  # fails where a file is, atomically, unlike a rename
            sync_folder(path.parent)
        except FileExistsError:
            return path.read_bytes() == data
        finally:
            staged.unlink(missing_ok=True)
        return True

    def upload(self, key: str, path: Path) -> None:
        self._copy(path, self.root / key)

    def download(self, key: str, path: Path) -> None:
        self._copy(self.root / key, path)

    def _copy(self, source: Path, target: Path) -> None:
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                shutil.copyfile(source, staged)
                with staged.open("rb") as file:
                    os.fsync(file.fileno())
                staged.replace(target)
            finally:
                staged.unlink(missing_ok=True)
            sync_folder(target.parent)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        if not self.root.is_dir():
            return
        found = []
        for path in self.root.rglob("*"):
            key = path.relative_to(self.root).as_posix()
            if path.is_file() and key.startswith(prefix) and not path.name.startswith("."):
                found.append(Entry(key, path.stat().st_size, str(path.stat().st_mtime_ns)))
        yield from sorted(found, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def sub(self, prefix: str) -> "LocalStorage":
        return LocalStorage(self.root / prefix)

    def local_path(self, key: str) -> Path:
        return self.root / key

    def abort_uploads(self) -> int:
        return 0


@lru_cache(maxsize=1)
def _service_models() -> Any:
    """What botocore knows of S3's interface: parsed once a process, not once a client."""
    from botocore.loaders import create_loader

    return create_loader()


class S3Storage:
    """A prefix in an S3 bucket. Credentials, region and endpoint (AWS_ENDPOINT_URL) are boto3's own."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None

    @property
    def client(self) -> Any:
        """boto3's client, made on first use and never carried over a fork or a pickle."""
        if self._client is None or self._client[0] != os.getpid():
            from boto3.session import Session
            from botocore.config import Config as ClientConfig
            from botocore.session import get_session

            # "adaptive" would hold all requests of a client back for a minute after a few 503.
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
        """Turns botocore's errors into FileNotFoundError, or one line for the user."""
        from boto3.exceptions import RetriesExceededError, S3UploadFailedError
        from botocore import exceptions as boto

        try:
            yield
        except (boto.NoCredentialsError, boto.PartialCredentialsError):
            raise UserError(f"{self.url}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, RetriesExceededError) as error:
            raise ConnectionError(f"{self.url}: the S3 server does not answer, or not to the end ({error})") from error
        except boto.FlexibleChecksumError as error:
            raise ArrivedChanged(f"{self.join(key)}: arrived changed ({error})") from error
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
                raise UserError(f"{self.url}: no bucket {self.bucket!r} there; make it first") from None
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
                if error.response["Error"].get("Code") not in (
                    "PreconditionFailed",
                    "ConditionalRequestConflict",
                    "412",
                ):
                    raise
                return self.read_if_present(key) == data  # a retried PUT can meet itself
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

    def abort_uploads(self) -> int:
        """Ends the multipart uploads under this prefix that nobody completed: unseen, but paid for. How many."""
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
