"""Owns the document that an evaluation leaves: every metric with its spread, and what is needed to repeat
it."""

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from cmscale.runs.manifests import Document

METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "density", "coverage")


class Metric(Document):
    """A metric over independent sets of samples; the deviation of a single value is 0 and says nothing."""

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Metric":
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean=statistics.fmean(values), std=spread, values=tuple(values))


class EvaluationResult(Document):
    """The content of a run's `evaluations/*.json`.

    `fid` is the Fréchet distance over pooled `features`; only over `inception` is it an FID, and `score_name`
    says what it is to be called. `kid_subset_std` and `inception_score_split_std` are the deviations within
    one set.

    Attributes:
        step, weights, nfe: the checkpoint, its weights and the network's evaluations a sample; None for
        finished images.
        times: the sampler's times where they were given; None for those that follow from the number of steps
        (`protocol` has them in either case).
        seeds: one for each independent set of samples.
        reference: what `Reference.describe` says.
        protocol: sampler, times, quantisation, hashes of the networks' weights, versions: what a repetition
        needs.
        warnings: known differences between the reference and the training data; metrics left out, and why.
    """

    step: int | None = None
    weights: str | None = None
    nfe: int | None = None
    times: tuple[float, ...] | None = None
    num_samples: int
    seeds: tuple[int, ...]
    features: str
    score_name: str
    reference: dict[str, Any]
    fid: Metric
    sfid: Metric | None = None
    inception_score: Metric | None = None
    precision: Metric | None = None
    recall: Metric | None = None
    kid: Metric | None = None
    density: Metric | None = None
    coverage: Metric | None = None
    kid_subset_std: Metric | None = None
    inception_score_split_std: Metric | None = None
    seconds: float
    protocol: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def combine(measured: Sequence[dict[str, float]]) -> dict[str, Metric]:
    """The metrics of several independent sets (each as `measure` gives them) as `EvaluationResult` fields."""
    return {name: Metric.of([values[name] for values in measured]) for name in measured[0]}


def score_name(features: str) -> str:
    """What the Fréchet distance over these features is called: FID over the FID Inception alone."""
    if features.startswith("dinov2"):
        return "FD-DINOv2"
    return {"inception": "FID", "efficientnet_lite0": "FD-EfficientNet"}.get(features, f"FD-{features}")


class Trial(Document):
    """One set of times that was measured."""

    indices: tuple[int, ...]
    times: tuple[float, ...]
    score: float


class TimeSearch(Document):
    """What a search found, and all it tried; `complete` is false while it is under way.

    Attributes:
        step, weights, score_name, num_samples, seed: what was sampled, and by what it was judged.
        last: the grid is 0..last, descending.
        trials: every evaluation, in the order made.
        indices, times, score: the best of all trials with as many steps as asked for.
        protocol: what a repetition needs, and what a resumption must share.
    """

    version: int = 1
    step: int
    weights: str
    steps: int
    last: int
    score_name: str
    num_samples: int
    seed: int
    complete: bool = False
    indices: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    score: float | None = None
    trials: tuple[Trial, ...] = ()
    protocol: dict[str, object]
