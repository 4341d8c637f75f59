"""Owns what is looked at before anything is created or submitted: data set, teacher, weight files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmscale.config import Config
from cmscale.errors import UserError
from cmscale.io.storage import LocalStorage, open_parent, open_storage
from cmscale.runs.manifests import DatasetManifest, read_dataset_manifest


def check_inputs(config: Config) -> DatasetManifest:
    """Everything that a training run reads is there and fits; cheap (manifests and names, no data).

    Raises:
        UserError: something is not; one line.
    """
    manifest = check_dataset(config.data.path, image_size=config.model.image_size)
    if teacher := getattr(config.method, "teacher", None):
        check_source(teacher, key="method.teacher")
    if weights := getattr(config.method, "lpips_weights", None):
        check_exists(weights, key="method.lpips_weights")
    return manifest


def check_evaluation(config: Config | None, *, asked: Mapping[str, Any]) -> None:
    """What samples will be compared with, and the features' weights, are there: those asked for, else the config's.

    Args:
        asked: of an evaluation's request `features`, `reference` and the weights' paths, where they are given.

    Raises:
        UserError: something is not; one line.
    """
    features = asked.get("features") or (config.evaluate.features if config else None)
    for key in ("reference", "inception_weights", "dinov2_weights"):
        if asked.get(key):
            check_exists(asked[key], key=f"--{key.replace('_', '-')}")
        elif config and key in ("reference", f"{features}_weights") and (named := getattr(config.evaluate, key)):
            check_exists(named, key=f"evaluate.{key}")
    if config and not (asked.get("reference") or config.evaluate.reference):
        check_dataset(config.data.path, image_size=config.model.image_size)


def check_export(export_to: str, name: str, *, is_new: bool) -> None:
    """Checkpoints can be exported: the place answers, and holds none of another run of this name.

    Raises:
        UserError: no such bucket, no credentials, or another run's checkpoints; one line.
    """
    there = open_storage(export_to).sub(name)
    if next(iter(there.list("checkpoints/")), None) is not None and is_new:
        raise UserError(
            f"checkpoint.export_to: {there.url} holds checkpoints of an earlier run {name}; "
            "take another --name or checkpoint.export_to"
        )


def check_dataset(url: str, *, image_size: int) -> DatasetManifest:
    """The manifest of a prepared data set that fits the network.

    Raises:
        UserError: none there, damaged, empty, or of another image size.
    """
    storage = open_storage(url)
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise UserError(f"data.path: {url}: no such folder; make a data set with data_prep/prepare.py")
    manifest = read_dataset_manifest(storage)
    if manifest.image_size != image_size:
        raise UserError(
            f"data.path: {url} holds images of {manifest.image_size} px, model.image_size is {image_size}; "
            "change one of them"
        )
    return manifest


def check_source(url: str, *, key: str) -> None:
    """A run, a checkpoint folder or a file is there (what is in it, the worker finds out).

    Raises:
        UserError: nothing there, or a run without a checkpoint.
    """
    if is_remote(url):
        return check_exists(url, key=key)
    path = Path(url)
    if not path.exists():
        raise UserError(f"{key}: {url}: no such file or folder")
    if path.is_dir() and (path / "config.yaml").exists() and not any(path.glob("checkpoints/step-*/manifest.json")):
        raise UserError(f"{key}: run {url} has no complete checkpoint yet")
    return None


def check_exists(url: str, *, key: str) -> None:
    """A local path exists; in S3 an object has this name or lies under it.

    Raises:
        UserError: nothing there.
    """
    url = url.partition("#sha256=")[0]
    if is_remote(url):
        storage, name = open_parent(url)
        found = (entry for entry in storage.list(name) if entry.key == name or entry.key.startswith(f"{name}/"))
        if next(found, None) is None:
            raise UserError(f"{key}: {url}: no such object")
    elif not Path(url).exists():
        raise UserError(f"{key}: {url}: no such file or folder")


def is_remote(url: str) -> bool:
    return "://" in url
