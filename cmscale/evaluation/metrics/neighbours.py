"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020): nearest neighbours.

Precision and density say how much of the samples lies where reference images are, recall and coverage how much of the
reference is reached. `cmscale.evaluation.manifold` computes all four in one comparison.
"""

from operator import attrgetter

from cmscale.evaluation.metrics.registry import NeighbourMetric

METRICS = tuple(
    NeighbourMetric(
        name=name, title=name, format=".3f", higher_is_better=True, compute=attrgetter(f"comparison.{name}")
    )
    for name in ("precision", "recall", "density", "coverage")
)
