"""The documents that evaluations and searches for sampling times write."""

import datetime
import hashlib
import json
import math
import statistics
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ModelWrapValidatorHandler, SerializerFunctionWrapHandler, model_serializer, model_validator

from cmscale.errors import UserError
from cmscale.io.reading import files_in, read_regular
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import Document, read_document


class Metric(Document):
    """A metric over independent sets of samples. The deviation of a single value is recorded as 0."""

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Metric":
        """The metric of one value per set."""
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean=statistics.fmean(values), std=spread, values=tuple(values))


_ADDED = (
    "names",
    "settings",
    "samples",
    "kept_samples",
    "date",
    "key",
)  # results of older versions lack them; left out where empty


class EvaluationResult(Document):
    """The content of a run's `evaluations/*.json`.

    In the file each metric is a key of its own, next to the other keys; a metric that was not measured is null. Any
    name is accepted whose value has the form of a `Metric` or is null, so that metrics of other versions stay readable.

    Attributes:
        step, weights, nfe: The checkpoint, its weights, and the network evaluations per sample; None for images that
            were not sampled here.
        times: The sampler's times if they were given; None if they follow from the number of steps. `protocol` has them
            in either case.
        seeds: One per independent set of samples.
        features: The label of the feature network.
        score_name: Name of the Fréchet distance over these features; only over the FID Inception it is FID.
        reference: What `Reference.describe` returns.
        metrics: By name, the deviations within one set of samples (`kid_subset_std`) among them. `fid` is always there.
        not_measured: Names of the metrics that were left out.
        protocol: What a repetition needs: sampler, times, quantisation, hashes of the networks' weights, versions.
        warnings: What limits the numbers: differences between the reference and the training data, and what of them is
            not known; too few samples; metrics that were left out, and why.
        names: Names of the metrics over these features, by key: `KID-EfficientNet` is no KID.
        settings: Parameters of the metrics by key, such as `k` of precision, and the subsets of KID.
        samples: Of finished samples: name, hash of the pixels, size, encoding.
        kept_samples: Of samples that were kept: seed, place, and hash of the pixels of each set.
        date: When the result was written, UTC.
        key: Hash of all that determines the numbers; two results with one key are measurements of the same.
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
    metrics: dict[str, Metric]
    not_measured: tuple[str, ...] = ()
    seconds: float
    protocol: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    names: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    samples: dict[str, Any] | None = None
    kept_samples: tuple[dict[str, Any], ...] = ()
    date: str | None = None
    key: str | None = None

    @property
    def fid(self) -> Metric:
        """The Fréchet distance over the pooled features, the score that results are compared by."""
        return self.metrics["fid"]

    @model_validator(mode="wrap")
    @classmethod
    def _read_flat(cls, given: Any, read: ModelWrapValidatorHandler["EvaluationResult"]) -> "EvaluationResult":
        if isinstance(given, Mapping) and "metrics" not in given:
            metrics = {key: value for key, value in given.items() if key not in cls.model_fields}
            rest = {key: value for key, value in given.items() if key in cls.model_fields}
            measured = {name: value for name, value in metrics.items() if value is not None}
            given = {**rest, "metrics": measured, "not_measured": tuple(sorted(metrics.keys() - measured.keys()))}
        result = read(given)
        if "fid" not in result.metrics:
            raise ValueError("fid is missing")
        if not math.isfinite(result.fid.mean):  # it would be the best or the worst by chance
            raise ValueError("fid is no finite number")
        return result

    @model_serializer(mode="wrap")
    def _write_flat(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = {name: value for name, value in write(self).items() if value or name not in _ADDED}
        metrics, not_measured = content.pop("metrics"), content.pop("not_measured")
        return {**content, **metrics, **dict.fromkeys(not_measured)}


def read_evaluations(run: RunDir) -> tuple[list[EvaluationResult], list[str]]:
    """The evaluations in a run's folder, and one line per file that is not readable.

    They are sorted by step, weights and NFE; of several of those, by the number of samples, the largest first.
    """
    found, unreadable = [], []
    for _, result in read_evaluation_files(run, unreadable=unreadable):
        if result is not None:
            found.append(result)
    return sorted(found, key=_place), unreadable


def read_evaluation_files(
    run: RunDir, *, without: Container[str] = (), unreadable: list[str] | None = None
) -> Iterator[tuple[Path, EvaluationResult | None]]:
    """The files of a run's evaluations and what they hold; None for one that is not readable.

    Args:
        without: Names of files that are left out.
        unreadable: Takes one line per file that is not readable.
    """
    for path in files_in(run.evaluations, "*.json", unreadable):
        if path.name in without:
            continue
        try:
            yield path, read_document(EvaluationResult, read_regular(path), origin=path.name)
        except (UserError, OSError) as error:
            if unreadable is not None:
                unreadable.append(str(error) if isinstance(error, UserError) else f"{path.name}: {error.strerror}")
            yield path, None


def _place(result: EvaluationResult) -> tuple[Any, ...]:
    return (
        result.step or 0,
        result.weights or "",
        result.nfe or 0,
        -result.num_samples,
        result.features,
        result.date or "",
    )


def utc_now() -> str:
    """The time now, as results record it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def hash_of(identity: Mapping[str, Any]) -> str:
    """The SHA-256 of a description of plain values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def combine(measured: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
    """The metrics that all of several independent sets of samples have, each set as `measure` returns it."""
    names = [name for name in measured[0] if all(name in values for values in measured)]
    return {name: Metric.of([values[name] for values in measured]) for name in names}


class Trial(Document):
    """A set of times that was measured, as indices on the grid and as noise levels."""

    indices: tuple[int, ...]
    times: tuple[float, ...]
    score: float


class TimeSearch(Document):
    """A search for sampling times and all that it tried; `complete` is false while it is under way.

    Attributes:
        step, weights, num_samples, seed: The checkpoint, its weights, and the samples that each trial draws.
        score_name: Name of the score that trials are compared by.
        steps: The number of sampling steps whose times are searched for.
        last: The grid is 0..last, descending.
        trials: Every evaluation, in the order made.
        indices, times, score: The best trial with `steps` steps.
        protocol: What a repetition needs and a resumed search must share.
        date, key: As in `EvaluationResult`; searches of older versions lack them.
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
    date: str | None = None
    key: str | None = None
