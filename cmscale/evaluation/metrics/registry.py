"""Finds the metrics and defines what each of them states about itself.

Every other module of this package is a metric's: it defines `METRICS`, a tuple of `DistributionMetric` and
`NeighbourMetric`. All code that computes, stores, prints or draws metrics iterates over `all_metrics()`, so that a new
metric is a new file in this package. ops/adding_a_metric.md has an example.

Metric modules import no torch when they are imported: reports and model cards read them for titles and formats.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import cmscale.evaluation.metrics as package
from cmscale.evaluation.statistics import Moments
from cmscale.runs.results import EvaluationResult, Metric

if TYPE_CHECKING:
    from cmscale.evaluation.manifold import NeighbourSets


class Need(Enum):
    """Input that a distribution metric needs besides the pooled features, which are always there.

    SPATIAL_FEATURES: `spatial` of the samples and of the reference.
    CLASS_LOGITS: `logits` of the samples.
    REFERENCE_IMAGES: `subset` of the reference, with at least two images.
    """

    SPATIAL_FEATURES = auto()
    CLASS_LOGITS = auto()
    REFERENCE_IMAGES = auto()


@dataclass(frozen=True)
class SampleSet:
    """The features of one set of N samples.

    Attributes:
        pooled: Pooled features, float32 [N, D].
        moments: The Gaussian of the pooled features.
        spatial: The Gaussian of the spatial features; None if the network or the reference has none.
        logits: Class logits, float32 [N, classes]; None if the network has none.
    """

    pooled: np.ndarray
    moments: Moments
    spatial: Moments | None = None
    logits: np.ndarray | None = None


class ReferenceSet(Protocol):
    """The features of the reference images, as `cmscale.evaluation.reference` reads them.

    Attributes:
        pooled: The Gaussian of the pooled features.
        spatial: The Gaussian of the spatial features, or None.
        subset: Pooled features of some of the images, float32 [M, D], or None.
    """

    @property
    def pooled(self) -> Moments:
        """The Gaussian of the pooled features."""
        ...

    @property
    def spatial(self) -> Moments | None:
        """The Gaussian of the spatial features, or None."""
        ...

    @property
    def subset(self) -> np.ndarray | None:
        """Pooled features of some of the images, float32 [M, D], or None."""
        ...


@dataclass(frozen=True)
class SetSizes:
    """How many samples and reference images a measurement compares.

    Attributes:
        samples: The number of samples in one set.
        reference: The number of images in the reference's Gaussian; None if it is not known.
        subset: The number of reference images whose features are at hand.
        width: The number of pooled features.
    """

    samples: int
    reference: int | None
    subset: int
    width: int


@dataclass(frozen=True, kw_only=True)
class MetricDefinition:
    """What a metric states about itself.

    Attributes:
        name: Key in the results' JSON.
        title: Name in tables, model cards and messages.
        format: Format specification of its values, such as `.2f`.
        higher_is_better: Whether the larger of two values is the better one.
        spread_name: Key in the results' JSON of the deviation within one set of samples, if there is one.
        stem: The part of the title to which the name of other features than the FID Inception's is added; the whole
            title by default.
        settings: Its parameters, for the results' JSON.
        caveat: What sets of these sizes do to its values, as a line for the results' warnings; None if they are large
            enough.
    """

    name: str
    title: str
    format: str
    higher_is_better: bool
    spread_name: str | None = None
    stem: str = ""
    settings: Callable[[SetSizes], Mapping[str, Any]] = lambda _: {}
    caveat: Callable[[SetSizes], str | None] = lambda _: None

    def title_over(self, score_name: str) -> str:
        """The title over features whose Fréchet distance is called `score_name`.

        Published values are over the FID Inception, so `KID` over the features of FD-EfficientNet is called
        `KID-EfficientNet`. The Fréchet distance has its own name.
        """
        if self.name == "fid":
            return score_name
        if score_name == "FID":
            return self.title
        stem = self.stem or self.title
        return self.title.replace(stem, f"{stem}-{score_name.removeprefix('FD-')}", 1)

    def title_in(self, result: EvaluationResult) -> str:
        """The title of this metric of a result."""
        return result.names.get(self.name) or self.title_over(result.score_name)

    def best(self, results: Sequence[EvaluationResult]) -> EvaluationResult:
        """The result with the best mean; all must have this metric. The earliest of equal ones."""
        choose = max if self.higher_is_better else min
        return choose(results, key=lambda result: result.metrics[self.name].mean)

    def formatted(self, measured: Metric) -> tuple[str, str]:
        """Mean and deviation as text, with as many decimals; the deviation of a single value is empty."""
        mean = f"{measured.mean:{self.format}}"
        if len(measured.values) < 2:
            return mean, ""
        digits, exponent, _ = mean.partition("e")
        decimals = len(digits.partition(".")[2])
        return mean, f"± {measured.std:.{decimals}{'e' if exponent else 'f'}}"


@dataclass(frozen=True, kw_only=True)
class DistributionMetric(MetricDefinition):
    """A metric of two distributions of features, computed by rank 0 alone.

    Attributes:
        needs: Inputs without which the metric is left out.
        compute: Returns the value, or (value, spread) if `spread_name` is set.
    """

    compute: Callable[[SampleSet, ReferenceSet], float | tuple[float, float]]
    needs: frozenset[Need] = frozenset()

    def values(self, samples: SampleSet, reference: ReferenceSet) -> dict[str, float]:
        """The metric, and its spread if it has one, by their keys in the results' JSON."""
        match self.compute(samples, reference):
            case float(value) if self.spread_name is None:
                return {self.name: value}
            case (float(value), float(spread)) if self.spread_name is not None:
                return {self.name: value, self.spread_name: spread}
            case other:
                raise TypeError(f"metric {self.name}, spread_name {self.spread_name}: compute returned {other!r}")


@dataclass(frozen=True, kw_only=True)
class NeighbourMetric(MetricDefinition):
    """A metric of nearest neighbours. It needs single reference images, and all ranks compute it together.

    Attributes:
        compute: Returns the value. Collective.
    """

    compute: "Callable[[NeighbourSets], float]"


def all_metrics() -> tuple[DistributionMetric | NeighbourMetric, ...]:
    """Every metric of every module of this package, in the order of the modules' names.

    Raises:
        TypeError: A module defines no `METRICS`, or two metrics (or a metric and another key of a result) share a name.
    """
    found: list[DistributionMetric | NeighbourMetric] = []
    for module in pkgutil.iter_modules(package.__path__):
        if module.name == "registry":
            continue
        name = f"{package.__name__}.{module.name}"
        metrics = getattr(importlib.import_module(name), "METRICS", ())
        if not metrics or not all(isinstance(each, DistributionMetric | NeighbourMetric) for each in metrics):
            raise TypeError(f"{name}: defines no METRICS, a tuple of metrics; see ops/adding_a_metric.md")
        found += metrics
    _check_names(found)
    return tuple(found)


def result_keys() -> Iterator[str]:
    """The keys that metrics and their spreads have in an evaluation's JSON."""
    for metric in all_metrics():
        yield from (name for name in (metric.name, metric.spread_name) if name is not None)


def _check_names(metrics: list[DistributionMetric | NeighbourMetric]) -> None:
    taken = set(EvaluationResult.model_fields)
    for metric in metrics:
        for name in (metric.name, metric.spread_name):
            if name in taken:
                raise TypeError(f"metric {metric.name}: the key {name!r} of an evaluation's JSON is already taken")
            if name is not None:
                taken.add(name)
