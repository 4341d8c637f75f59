"""Says what of a config goes to others with exported weights: how the model was made, not where and by whom."""

from typing import Any

from cmscale.config.files import dump_yaml
from cmscale.config.models import Config
from cmscale.io.place import split_hash

_OF_THE_SITE = ("slurm", "restart", "storage", "wandb", "tensorboard", "prometheus")
_PLACES = ("data.cache_dir", "checkpoint.export_to")
_ELSEWHERE = "(elsewhere)/"
"""Stands for the folders of a path on the machine that made a model: no file of another machine is taken for it."""


def published(config: Config) -> Config:
    """The config with the defaults of what belongs to a site, and with names in place of absolute local paths.

    The names tell what a model was trained on and from; `is_elsewhere` recognises them.
    """
    tree = config.model_dump(exclude={*_OF_THE_SITE})
    for key in _PLACES:
        section, leaf = key.split(".")
        tree[section][leaf] = None
    return Config.model_validate(_named(tree))


def dump_published(config: Config) -> str:
    """What `published` leaves of a config, as YAML."""
    return dump_yaml(published(config).model_dump(mode="json", exclude={*_OF_THE_SITE}))


def _named(value: Any) -> Any:
    """The same with the last part of each absolute local path in it, marked as lying elsewhere."""
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, str) and value.startswith("/"):
        plain, digest = split_hash(value)
        name = plain.rstrip("/").rpartition("/")[2]
        return _ELSEWHERE + (name if digest is None else f"{name}#sha256={digest}")
    return value


def is_elsewhere(place: str) -> bool:
    """Whether it is the name alone of what lay on the machine that exported a model."""
    return place.startswith(_ELSEWHERE)
