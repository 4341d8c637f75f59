"""Loads a SOURCE of trained weights: a run, a checkpoint, exported weights, or another project's file."""

from cmscale.source.choices import check_choices, checkpoint_step, model_kind, newest_step
from cmscale.source.initial import load_first_weights, load_teacher
from cmscale.source.loading import load_source
from cmscale.source.source import IMPORTED, Source, dataset_of, weights_fingerprint

__all__ = [
    "IMPORTED",
    "Source",
    "check_choices",
    "checkpoint_step",
    "dataset_of",
    "load_first_weights",
    "load_source",
    "load_teacher",
    "model_kind",
    "newest_step",
    "weights_fingerprint",
]
