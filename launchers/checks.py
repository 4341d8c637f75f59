"""Checks inputs before anything is created or submitted: data set, teacher, weight files, place of exports."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmscale.commands import situation
from cmscale.config import Config, Evaluate, read_config
from cmscale.config.agreement import check_openai_teacher, check_openai_weights, check_teacher, check_weights
from cmscale.config.sources import is_openai, names_file, refuse_hub_name
from cmscale.errors import UserError
from cmscale.io.packages import require
from cmscale.io.place import Place, split_hash
from cmscale.io.probe import DELETE, probe
from cmscale.io.published import VGG16, published_file
from cmscale.io.reading import why_no_file
from cmscale.io.storage import has_object, open_parent, open_storage
from cmscale.io.wandb_login import find_login
from cmscale.runs.checkpoints import committed_steps, read_manifest
from cmscale.runs.choices import check_weights_name
from cmscale.runs.configs import config_of
from cmscale.runs.folder import RunDir
from cmscale.runs.manifest_checks import must_continue
from cmscale.runs.manifests import DatasetManifest, read_dataset_manifest
from cmscale.runs.named_files import check_own_weights, check_reference, check_weights_file
from cmscale.runs.source_kind import kind_of_source


def check_inputs(config: Config, *, begins: bool = True) -> DatasetManifest:
    """Checks that everything a training run reads exists and fits. Cheap: reads manifests and names, no data.

    Args:
        begins: Whether training starts at step 0: a run that goes on from a checkpoint reads no first weights, and a
            teacher only if it follows it in every step.

    Returns:
        The data set's manifest.

    Raises:
        UserError: something is missing or does not fit; one line.
    """
    if config.tensorboard.enabled:
        require("tensorboard", key="tensorboard.enabled")
    if config.wandb.mode == "auto":
        find_login()
    manifest = check_dataset(config.data.path, image_size=config.model.image_size)
    if begins or config.method.facts.follows_teacher:
        check_teacher_of(config)
    if begins:
        check_first_weights(config)
    if weights := getattr(config.method, "lpips_weights", None):
        check_exists(weights, key="method.lpips_weights")
        check_weights_file(weights, key="method.lpips_weights", safetensors=True)
    if config.train.consistency_error_every and (url := config.train.consistency_error_data):
        check_dataset(url, image_size=config.model.image_size, key="train.consistency_error_data")
    return manifest


def check_continues(config: Config, run: RunDir, data: DatasetManifest) -> None:
    """Checks that a run may go on from its newest checkpoint, before its job waits in a queue.

    Whether that checkpoint is whole the ranks see, and take the one before if it is not.

    Raises:
        UserError: its config.yaml was edited, or its data set is another one.
    """
    steps = committed_steps(run)
    try:
        manifest = read_manifest(open_storage(str(run.checkpoint(max(steps))))) if steps else None
    except UserError:
        return
    if manifest is not None:
        must_continue(manifest, config, run, data_fingerprint=data.fingerprint)


def check_teacher_of(config: Config) -> None:
    """Checks that a config's teacher exists and, where its own config can be read here, that the two agree.

    Raises:
        UserError: there is no such teacher, or it can't teach this config's student.
    """
    if teacher := getattr(config.method, "teacher", None):
        refuse_hub_name(teacher)
        check_source(teacher, key="method.teacher")
    choice = config.method.teacher_choice
    if choice is None:
        return
    if is_openai(choice.source):
        check_openai_teacher(config)
    elif (its_config := config_beside(choice.source)) is not None:
        check_teacher(its_config, config, origin=choice.source)
        if choice.weights_name is not None and Path(choice.source).is_dir():
            check_weights_name(its_config, choice.weights_name, key="method.teacher_weights")


def check_first_weights(config: Config) -> None:
    """Checks that `train.init_from` exists and, where its config can be read here, that it is of the same network.

    Raises:
        UserError: there is no such source, or it can't be a first one for this config.
    """
    key, origin = "train.init_from", config.train.init_from
    if origin is None:
        return
    refuse_hub_name(origin)
    check_source(origin, key=key)
    if is_openai(origin):
        check_openai_weights(config, key=key, origin=origin, named=config.train.init_weights)
    elif (its_config := config_beside(origin)) is not None:
        check_weights(its_config, config, key=key, origin=origin)
        if config.train.init_weights is not None and Path(origin).is_dir():
            check_weights_name(its_config, config.train.init_weights, key="train.init_weights")


def config_beside(source: str) -> Config | None:
    """The config of a run, a checkpoint or an exported file; None for other sources, which only the worker can read.

    Files in a storage are other sources, too: they have gigabytes.
    """
    folder = Path(source).absolute()
    for root in (folder, folder.parent.parent):
        if not is_remote(source) and (root / "config.yaml").is_file():
            return read_config(root / "config.yaml", resolved=True)
    if is_remote(source) and names_file(source):
        return None
    try:
        is_known = kind_of_source(source) in (situation.RUN, situation.CHECKPOINT, situation.EXPORTED)
    except UserError:
        return None
    return config_of(Place(source)) if is_known else None


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
            check = check_reference if key == "reference" else check_weights_file
            check(used, key=f"evaluate.{key}")
    for key in files:
        if given := options[key]:
            check_exists(given, key=f"--{key.replace('_', '-')}")
    if config and not settings.reference:
        check_dataset(config.data.path, image_size=config.model.image_size)
        check_reference(config.data.path, key="data.path")


def fetch_published(config: Config, *, evaluates: bool) -> None:
    """Fetches published weights that the job would fetch, if they are not here: its nodes may have no internet.

    Args:
        evaluates: Whether checkpoints are evaluated during training.

    Raises:
        UserError: they can't be fetched, or a feature network has none.
    """
    distance = config.method.distance_settings
    if distance is not None and distance.name == "lpips" and distance.lpips_weights is None:
        published_file(VGG16)
    if evaluates and config.evaluate.weights()[1] is None:
        check_own_weights(config.evaluate.features)


def check_export(export_to: str, name: str, *, is_new: bool, prunes: bool = False) -> None:
    """Checks that checkpoints can be exported: a small object is written, read, written conditionally and removed.

    Args:
        is_new: Whether the run is new: then there must be no checkpoints of its name.
        prunes: Whether old copies are to be removed: otherwise deleting need not be allowed.

    Raises:
        UserError: no such bucket, no credentials, not allowed, or another run's checkpoints; one line.
    """
    target = open_storage(export_to).sub(name)
    if next(iter(target.list("checkpoints/")), None) is not None and is_new:
        raise UserError(
            f"checkpoint.export_to: {target.url} holds checkpoints of an earlier run {name}; "
            "take another --name or checkpoint.export_to"
        )
    for found in probe(target):
        if found.problem and found.what == DELETE and not prunes:
            print(
                f"note: checkpoint.export_to: deleting is not allowed, so a probe stays ({found.problem})",
                file=sys.stderr,
            )
        elif found.problem:
            advice = "; allow it, or leave out checkpoint.export_keep_last" if found.what == DELETE else ""
            raise UserError(f"checkpoint.export_to: {found.what}: {found.problem}{advice}")


def check_dataset(url: str, *, image_size: int, key: str = "data.path") -> DatasetManifest:
    """Reads the manifest of a prepared data set, and checks that it fits the network.

    Args:
        image_size: The network's, in pixels.
        key: The key that names the data set, for messages.

    Raises:
        UserError: there is none, or it is damaged, empty, or of another image size.
    """
    storage = open_storage(url)
    folder = storage.local_path("")
    if folder is not None and not folder.is_dir():
        raise UserError(f"{key}: {url}: no such folder; make a data set with data_prep/prepare.py")
    manifest = read_dataset_manifest(storage)
    if manifest.image_size != image_size:
        raise UserError(
            f"{key}: {url} holds images of {manifest.image_size} px, model.image_size is {image_size}; "
            "change one of them"
        )
    return manifest


def check_source(url: str, *, key: str) -> None:
    """Checks that a run, a checkpoint folder or a file of weights exists; the worker checks its contents.

    Raises:
        UserError: there is nothing, a run without a checkpoint, or something else.
    """
    if is_remote(url):
        check_exists(url, key=key)
        return
    path = Path(split_hash(url)[0])
    if not path.exists():
        raise UserError(f"{key}: {url}: {why_no_file(path, absent='no such file or folder')}")
    if path.is_dir() and (path / "config.yaml").exists() and not committed_steps(path):
        raise UserError(f"{key}: run {url} has no complete checkpoint yet")
    try:
        kind = kind_of_source(url)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if kind == situation.SAMPLES:
        raise UserError(f"{key}: {url}: finished samples or other files, no model; give a run or exported weights")


def check_exists(url: str, *, key: str) -> None:
    """Checks that a local path exists, or that an object in S3 has this name or prefix.

    Raises:
        UserError: there is nothing.
    """
    url, _ = split_hash(url)
    if is_remote(url):
        storage, name = open_parent(url)
        if not has_object(storage, name) and next(iter(storage.list(f"{name}/")), None) is None:
            raise UserError(f"{key}: {url}: no such object")
    elif not Path(url).exists():
        raise UserError(f"{key}: {url}: {why_no_file(url, absent='no such file or folder')}")


def is_remote(url: str) -> bool:
    """Whether a location is a URL rather than a local path."""
    return "://" in url
