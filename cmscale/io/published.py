"""Finds weights that others publish on the web: in torch hub's cache, into which they are fetched once per node.

Commands look before torch is imported, and launchers before a job is queued: compute nodes often have no internet.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io import traffic
from cmscale.io.durable import explained, follow_umask
from cmscale.io.fetch import download_lock

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30.0  # without an answer, or without a byte


@dataclass(frozen=True)
class Published:
    """A file of weights on the web. Its name ends with the first digits of its SHA-256, as torch hub's files do.

    Attributes:
        what: What it is, in words.
        key: The config's key that names a copy of it.
    """

    what: str
    url: str
    key: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]

    @property
    def sha256_prefix(self) -> str:
        """How the file's hash begins."""
        return Path(self.name).stem.rpartition("-")[2]


VGG16 = Published(
    "VGG16 for LPIPS", "https://download.pytorch.org/models/vgg16-397923af.pth", key="method.lpips_weights"
)
INCEPTION = Published(
    "Inception for FID",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    key="evaluate.inception_weights",
)


def hub_checkpoints() -> Path:
    """Where torch hub keeps weights: by TORCH_HOME, else XDG_CACHE_HOME, else in ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{caches}/torch")).expanduser() / "hub" / "checkpoints"


def published_file(wanted: Published) -> Path:
    """The local file of published weights; one process of a node downloads it, and the others wait.

    Raises:
        UserError: it is not there and can't be downloaded; the message says which key names a copy.
    """
    path = hub_checkpoints() / wanted.name
    if path.is_file() and path.stat().st_size:
        return path
    from http.client import HTTPException  # takes longer to import than most commands need

    with download_lock(f"{wanted.name}.lock", into=path.parent, setting="TORCH_HOME"):
        if not (path.is_file() and path.stat().st_size):
            try:
                _download(wanted, path)
            except (OSError, HTTPException) as error:
                raise UserError(
                    f"{wanted.what}: not in {path.parent}, and can't be downloaded from {wanted.url} ({error}); "
                    f"copy it there, or set {wanted.key} to a copy"
                ) from None
    return path


def _download(wanted: Published, path: Path) -> None:
    """Raises OSError or HTTPException if the file does not arrive as it was published."""
    import urllib.request

    with urllib.request.urlopen(wanted.url, timeout=_TIMEOUT_SECONDS) as answer, explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        digest = hashlib.sha256()
        try:
            with staged.open("xb") as file, traffic.showing(f"downloading {wanted.name}", answer.length) as shown:
                while chunk := answer.read(_CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    shown.moved(len(chunk))
            if not digest.hexdigest().startswith(wanted.sha256_prefix):
                raise OSError(f"what arrived has the SHA-256 {digest.hexdigest()[:16]}...")
            follow_umask(staged)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
