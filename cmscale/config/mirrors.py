"""Defines the config sections of the programs that a run's metrics are sent to."""

from typing import Literal

from cmscale.config.section import Section, operational


class Wandb(Section):
    """Logging to Weights & Biases, in addition to metrics.jsonl."""

    mode: Literal["auto", "online", "offline", "off"] = operational(
        "auto",
        "auto: what WANDB_MODE or `wandb offline` say; else online if `wandb login` has left a key, or there is a "
        "WANDB_API_KEY, and offline if not. offline: files in the run's folder for `wandb sync`.",
    )
    project: str = operational("cmscale", "Name of the project.")
    entity: str | None = operational(None, "User or team; null: the key's default.")


class Tensorboard(Section):
    """Logging to TensorBoard, in addition to metrics.jsonl."""

    enabled: bool = operational(
        False, "Event files in the run's folder tensorboard/. Needs the package tensorboard on the nodes."
    )


class Prometheus(Section):
    """A text file of the newest numbers, for the textfile collector of Prometheus's node exporter."""

    enabled: bool = operational(False, "Keep such a file up to date: metrics, scores, counts of events.")
    folder: str | None = operational(
        None, "The collector's folder on the node of rank 0; null: metrics.prom in the run's folder."
    )
