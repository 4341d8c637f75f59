"""Owns the model card: what exported weights are, of which training, and how good, as a README.md."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cmscale.config import Config, dump_config
from cmscale.interop.names import parameter_shapes
from cmscale.runs.manifests import DatasetManifest

METHODS = {
    "edm": "a diffusion model (EDM, Karras et al. 2022)",
    "cd": "a consistency model by distillation (CD, Song et al. 2023, algorithm 2)",
    "ct": "a consistency model trained from scratch (CT, Song et al. 2023, algorithm 3)",
    "ict": "a consistency model by improved consistency training (iCT, Song and Dhariwal 2023)",
    "ect": "a consistency model by easy consistency tuning (ECT, Geng et al. 2024)",
    "sct": "a consistency model by continuous-time consistency training (sCT, Lu and Song 2024)",
    "scd": "a consistency model by continuous-time consistency distillation (sCD, Lu and Song 2024)",
    "pd": "a diffusion model by progressive distillation (Salimans and Ho 2022)",
}
METRICS = {
    "fid": "Fréchet distance",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
    "kid": "KID",
}


def model_card(
    config: Config,
    *,
    step: int,
    weights_name: str,
    dataset: DatasetManifest | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of the weights `weights_name` at `step`.

    Args:
        dataset: The manifest of the training data, where it is at hand.
        evaluations: What `cmscale evaluate` wrote; those of other steps or weights are left out.
    """
    model, method, train = config.model, config.method, config.train
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    about = METHODS.get(method.kind, f"a model of method {method.kind}")
    images = step * train.global_batch_size
    size = f"{model.image_size}x{model.image_size}"
    lines = [
        "---",
        "tags: [image-generation, unconditional-image-generation, consistency-models]",
        "---",
        "",
        f"# {method.kind.upper()} at {size}",
        "",
        f"This is {about}: an ADM UNet of {count / 1e6:.1f} M parameters for {size} images.",
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
        *_quality([item for item in evaluations if item["step"] == step and item["weights"] == weights_name]),
        "",
        "## Limits",
        "",
        "The model draws what its training data shows, with that data's gaps and prejudices; its samples are",
        "photographs of nothing real.",
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
        yield f"| Data, in detail | {dataset.count:,} of {dataset.source}, cut as {dataset.preprocess} |"
        yield f"| Data, fingerprint | `{dataset.fingerprint}` |"


def _quality(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not evaluations:
        yield "Not evaluated."
        return
    names = [name for name in METRICS if any(item.get(name) for item in evaluations)]
    yield f"| Evaluations a sample | Samples | Features | {' | '.join(METRICS[name] for name in names)} |"
    yield "|" + "---|" * (3 + len(names))
    for item in sorted(evaluations, key=lambda item: item["nfe"]):
        cells = [_with_spread(item.get(name)) for name in names]
        yield f"| {item['nfe']} | {item['num_samples']:,} | {item['features']} | {' | '.join(cells)} |"


def _with_spread(metric: Mapping[str, Any] | None) -> str:
    """`mean`, with the standard deviation where several runs give one."""
    if not metric:
        return "-"
    text = f"{metric['mean']:.4g}"
    return f"{text} ± {metric['std']:.2g}" if metric.get("std") else text
