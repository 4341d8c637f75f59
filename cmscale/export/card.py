"""The model card: a README.md that describes exported weights, their training and their quality."""

import math
from collections.abc import Iterator, Sequence

from cmscale.config import Config, dump_config
from cmscale.evaluation.metrics.registry import MetricDefinition, all_metrics
from cmscale.interop import parameter_shapes
from cmscale.runs.manifests import DatasetManifest
from cmscale.runs.results import EvaluationResult


def model_card(
    config: Config,
    *,
    step: int,
    weights_name: str,
    dataset: DatasetManifest | None = None,
    evaluations: Sequence[EvaluationResult] = (),
) -> str:
    """The card of the weights `weights_name` at `step`.

    Args:
        dataset: The manifest of the training data, if it is available.
        evaluations: Results of `cmscale evaluate`; those of other steps or weights are left out.
    """
    model, method, train = config.model, config.method, config.train
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    images = step * train.global_batch_size
    size = f"{model.image_size}x{model.image_size}"
    lines = [
        "---",
        "tags: [image-generation, unconditional-image-generation, consistency-models]",
        "---",
        "",
        f"# {method.kind.upper()} at {size}",
        "",
        f"This is {method.facts.description}: an ADM UNet of {count / 1e6:.1f} M parameters for {size} images.",
        "",
        "| | |",
        "|---|---|",
        f"| Weights | {weights_name} |",
        f"| Steps | {step:,} of {train.total_steps:,} |",
        f"| Images seen | {images:,} (global batch {train.global_batch_size:,}) |",
        f"| Optimizer | {config.optimizer.kind}, learning rate {config.optimizer.learning_rate:g} |",
        f"| Precision | {config.engine.precision} |",
        f"| Classes | {model.num_classes or 'none'} |",
        f"| Data | {config.data.path} |",
        *_data_rows(dataset),
        "",
        "## Quality",
        "",
        *_quality([each for each in evaluations if each.step == step and each.weights == weights_name]),
        "",
        "## Limits",
        "",
        "The model reproduces what its training data shows, including the gaps and biases of that data. Its samples",
        "depict nothing real.",
        "",
        "## Config",
        "",
        "```yaml",
        dump_config(config).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _data_rows(dataset: DatasetManifest | None) -> Iterator[str]:
    if dataset is not None:
        yield f"| Images in the data set | {dataset.count:,} of {dataset.source}, preprocessing {dataset.preprocess} |"
        yield f"| Fingerprint of the data set | `{dataset.fingerprint}` |"


def _quality(evaluations: Sequence[EvaluationResult]) -> Iterator[str]:
    """A table with one row per evaluation and one column per metric that any of them has."""
    if not evaluations:
        yield "Not evaluated."
        return
    metrics = [metric for metric in all_metrics() if any(metric.name in each.metrics for each in evaluations)]
    titles = " | ".join(metric.title for metric in metrics)
    yield f"| Network evaluations per sample | Samples | Features | {titles} |"
    yield "|" + "---|" * (3 + len(metrics))
    for each in sorted(evaluations, key=lambda each: each.nfe or 0):
        cells = " | ".join(_cell(each, metric) for metric in metrics)
        yield f"| {each.nfe} | {each.num_samples:,} | {each.features} | {cells} |"


def _cell(evaluation: EvaluationResult, metric: MetricDefinition) -> str:
    """The mean, and the standard deviation if there were several sets of samples."""
    measured = evaluation.metrics.get(metric.name)
    return "-" if measured is None else " ".join(metric.formatted(measured)).rstrip()
