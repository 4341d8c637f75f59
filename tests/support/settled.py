"""Makes the documents of a damaged folder agree with the damage, so that no hash hides it from what reads next."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmscale.runs.manifests import CheckpointManifest, ShardEntry, _sealed, dataset_fingerprint

MANIFEST = "manifest.json"


def settle(path: Path) -> dict[Path, bytes]:
    """Gives a file's manifest its size and hash, and a manifest its own seal or fingerprint, as far as it has them.

    Returns:
        The former contents of other files that were changed.
    """
    manifest = path.with_name(MANIFEST)
    if not path.is_file() or path.is_symlink() or not manifest.is_file():
        return {}
    before = manifest.read_bytes()
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError):
        tree = json.loads(before)
        if path != manifest:
            content = path.read_bytes()
            for entry in _entries(tree):
                if entry.get("name") == path.name:
                    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_bytes(_settled(tree))
    return {} if path == manifest else {manifest: before}


def _entries(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _entries(child)


def _settled(tree: dict[str, Any]) -> bytes:
    if "parts" in tree:
        tree.pop("sha256", None)
        return _sealed((json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())
    shards = tuple(ShardEntry.model_validate(entry) for entry in tree["shards"])
    described = {key: tree[key] for key in ("format", "image_size", "preprocess", "encoding")}
    tree["fingerprint"] = dataset_fingerprint(**described, shards=shards)
    tree["count"] = sum(shard.count for shard in shards)
    return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()


assert CheckpointManifest.model_fields["version"].default == 3, "seals as version 3 has them"
