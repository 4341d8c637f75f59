"""Writes the head of a model card: the metadata that Hugging Face's hub reads."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from cmscale.config import Config
from cmscale.evaluation.metrics.registry import all_metrics
from cmscale.export.target import Format
from cmscale.runs.comparison import describe_basis, groups_of, once_each, reference_names
from cmscale.runs.results import EvaluationResult

_WIDTH = 500  # a name in one line
UNKNOWN = "unknown"
"""The hub's identifier for a licence that nobody has stated."""
SHOWN_TIMES = 8  # of a result; of more only the number


def front_matter(
    title: str, config: Config, evaluations: Sequence[EvaluationResult], *, format: Format, license: str
) -> list[str]:
    """The metadata as YAML between two lines of dashes: licence, library, task, tags, scores."""
    kind = "unconditional" if config.model.num_classes is None else "class-conditional"
    found: dict[str, Any] = {
        "license": license,
        "library_name": "diffusers" if format == "diffusers" else "cmscale",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["image-generation", f"{kind}-image-generation", "consistency-models", config.method.kind],
    }
    if results := _results(evaluations):
        found["model-index"] = [{"name": title, "results": results}]
    return ["---", yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=_WIDTH).rstrip(), "---", ""]


def _results(evaluations: Sequence[EvaluationResult]) -> list[dict[str, Any]]:
    """The scores of each reference, by groups that may be compared, as the hub's model index has them."""
    return [
        {
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"type": "images", "name": reference_names(group)[0]},
            "metrics": [metric for each in once_each(group) for metric in _metrics(each)],
        }
        for group in groups_of(evaluations)
    ]


def _metrics(result: EvaluationResult) -> list[dict[str, Any]]:
    evaluations = f"{result.nfe} network evaluation{'' if result.nfe == 1 else 's'}"
    if result.times:
        many = len(result.times) > SHOWN_TIMES
        evaluations += f" at {'given times' if many else ' and '.join(f'{time:.4g}' for time in result.times)}"
    how = f"{evaluations}, {describe_basis(result)}, features {result.features}"
    found = []
    for metric in all_metrics():
        if metric.name in result.metrics:
            title = metric.title_over(result.score_name)
            # over other features than the FID Inception's it is another metric: `fd-dinov2`, `kid-dinov2`
            kind = metric.name if result.score_name == "FID" else title
            found.append(
                {
                    "type": re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-"),
                    "name": f"{title} ({how})",
                    "value": round(result.metrics[metric.name].mean, 6),
                }
            )
    return found
