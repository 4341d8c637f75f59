"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020): nearest neighbours.

Precision and density say how much of the samples lies where reference images are, recall and coverage how much of the
reference is reached. `cmscale.evaluation.manifold` computes all four in one comparison.
"""

from operator import attrgetter

from cmscale.evaluation.metrics.registry import NeighbourMetric

K = 3  # precision and recall (Kynkäänniemi et al. 2019), as in ADM's evaluator and torch-fidelity
DENSITY_K = 5  # density and coverage (Naeem et al. 2020), as in the released code


def _metric(name: str, k: int) -> NeighbourMetric:
    return NeighbourMetric(
        name=name,
        title=name,
        format=".3f",
        higher_is_better=True,
        settings=lambda sizes: {"k": k, "reference_images": sizes.subset},
        compute=attrgetter(f"comparison.{name}"),
    )


METRICS = (_metric("precision", K), _metric("recall", K), _metric("density", DENSITY_K), _metric("coverage", DENSITY_K))
