"""Checks inputs before anything is created or submitted: data set, teacher, weight files, place of exports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmscale.config import Config, Evaluate
from cmscale.config.sources import refuse_hub_name
from cmscale.errors import UserError
from cmscale.io.storage import open_parent, open_storage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.manifests import DatasetManifest, read_dataset_manifest


def check_inputs(config: Config) -> DatasetManifest:
    """Checks that everything a training run reads exists and fits. Cheap: reads manifests and names, no data.

    Returns:
        The data set's manifest.

    Raises:
        UserError: something is missing or does not fit; one line.
    """
    manifest = check_dataset(config.data.path, image_size=config.model.image_size)
    if teacher := getattr(config.method, "teacher", None):
        refuse_hub_name(teacher)
        check_source(teacher, key="method.teacher")
    if weights := getattr(config.method, "lpips_weights", None):
        check_exists(weights, key="method.lpips_weights")
    return manifest


def check_evaluation(config: Config | None, *, asked: Mapping[str, Any]) -> None:
    """Checks that an evaluation's reference and the weights of its feature network exist.

    Args:
        asked: Options of the command, by name; those that replace keys of `evaluate` are used.

    Raises:
        UserError: an option is not allowed, or a file is missing; one line.
    """
    files = ("features_weights", "inception_weights", "dinov2_weights", "reference")
    options = {key: asked.get(key) for key in ("features", *files)}
    settings = (config.evaluate if config else Evaluate()).replaced(options)
    weights_key, weights = settings.weights()
    for key, used in ((weights_key, weights), ("reference", settings.reference)):
        if used and not options[key]:
            check_exists(used, key=f"evaluate.{key}")
    for key in files:
        if given := options[key]:
            check_exists(given, key=f"--{key.replace('_', '-')}")
    if config and not settings.reference:
        check_dataset(config.data.path, image_size=config.model.image_size)


def check_export(export_to: str, name: str, *, is_new: bool) -> None:
    """Checks that checkpoints can be exported: the storage answers and, for a new run, holds none of its name.

    Raises:
        UserError: no such bucket, no credentials, or another run's checkpoints; one line.
    """
    target = open_storage(export_to).sub(name)
    if next(iter(target.list("checkpoints/")), None) is not None and is_new:
        raise UserError(
            f"checkpoint.export_to: {target.url} holds checkpoints of an earlier run {name}; "
            "take another --name or checkpoint.export_to"
        )


def check_dataset(url: str, *, image_size: int) -> DatasetManifest:
    """Reads the manifest of a prepared data set, and checks that it fits the network.

    Args:
        image_size: The network's, in pixels.

    Raises:
        UserError: there is none, or it is damaged, empty, or of another image size.
    """
    storage = open_storage(url)
    folder = storage.local_path("")
    if folder is not None and not folder.is_dir():
        raise UserError(f"data.path: {url}: no such folder; make a data set with data_prep/prepare.py")
    manifest = read_dataset_manifest(storage)
    if manifest.image_size != image_size:
        raise UserError(
            f"data.path: {url} holds images of {manifest.image_size} px, model.image_size is {image_size}; "
            "change one of them"
        )
    return manifest


def check_source(url: str, *, key: str) -> None:
    """Checks that a run, a checkpoint folder or a file exists; the worker checks its contents.

    Raises:
        UserError: there is nothing, or a run without a checkpoint.
    """
    if is_remote(url):
        check_exists(url, key=key)
        return
    path = Path(url)
    if not path.exists():
        raise UserError(f"{key}: {url}: no such file or folder")
    if path.is_dir() and (path / "config.yaml").exists() and not committed_steps(path):
        raise UserError(f"{key}: run {url} has no complete checkpoint yet")


def check_exists(url: str, *, key: str) -> None:
    """Checks that a local path exists, or that an object in S3 has this name or prefix.

    Raises:
        UserError: there is nothing.
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
    """Whether a location is a URL rather than a local path."""
    return "://" in url
