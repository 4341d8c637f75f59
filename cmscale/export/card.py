"""The model card: a README.md that describes exported weights, their training and their quality."""

import math
from collections.abc import Iterator, Sequence

import yaml

from cmscale.config import Config
from cmscale.config.published import dump_published
from cmscale.evaluation.metrics.registry import MetricDefinition, all_metrics
from cmscale.export.metadata import SHOWN_TIMES, UNKNOWN, front_matter
from cmscale.export.target import Format
from cmscale.export.usage import usage
from cmscale.interop import parameter_shapes
from cmscale.io.place import without_folders
from cmscale.runs.comparison import RULE, basis_of, describe_basis, groups_of, once_each
from cmscale.runs.manifests import DatasetManifest
from cmscale.runs.results import EvaluationResult
from cmscale.runs.source_kind import EXPORTED_WEIGHTS
from cmscale.source import IMPORTED

SAMPLES = "samples.png"
"""The grid of samples in an exported folder."""
_PRECONDITIONING = {"kind", "sigma_data", "sigma_min", "sigma_max", "rho", "time_embedding", "teacher_time_embedding"}


def model_card(
    config: Config,
    *,
    step: int,
    weights_name: str,
    weights_sha256: str | None = None,
    dataset: DatasetManifest | None = None,
    evaluations: Sequence[EvaluationResult] = (),
    format: Format = "safetensors",
    license: str = UNKNOWN,
    file: str = EXPORTED_WEIGHTS,
    has_samples: bool = False,
) -> str:
    """The card of the weights `weights_name` at `step`.

    Args:
        weights_sha256: `Source.fingerprint`, to leave out evaluations of other weights that had this name; None for
            those of any.
        dataset: The manifest of the training data, if it is available.
        evaluations: Results of `cmscale evaluate`; those of other steps or weights are left out.
        format: That of the weights: the card says how its project samples as cmscale does.
        license: Its identifier on Hugging Face's hub, such as `apache-2.0`.
        file: The name of the weights' file beside the card.
        has_samples: Whether `samples.png`, a grid of samples, is beside the card.

    The card of imported weights says nothing about their training: their config only says how they are used here. Local
    paths are shortened to their last part.
    """
    is_imported = weights_name == IMPORTED
    named = [each for each in evaluations if each.step == step and each.weights == weights_name]
    mine = [each for each in named if _is_of(each, weights_sha256)]
    title = f"{config.method.kind.upper()} at {config.model.image_size}x{config.model.image_size}"
    lines = [
        *front_matter(title, config, mine, format=format, license=license),
        *_heading(config, title, has_samples=has_samples),
        f"| Weights | {'imported from another project' if is_imported else weights_name} |",
        f"| Classes | {config.model.num_classes or 'none'} |",
        *([] if is_imported else _training_rows(config, step=step)),
        *([] if is_imported or dataset is None else _data_rows(dataset)),
        "",
        "## Quality",
        "",
        *_quality(mine),
        *_left_out(len(named) - len(mine)),
        *usage(format, config.method, file=file),
        *_licence(license),
        *_limits(),
        *_config(config, is_imported=is_imported),
    ]
    return "\n".join(lines)


def _heading(config: Config, title: str, *, has_samples: bool) -> Iterator[str]:
    """Everything from the title to the first rows of the table of facts."""
    model, method = config.model, config.method
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    size = f"{model.image_size}x{model.image_size}"
    yield f"# {title}"
    yield ""
    yield f"This is {method.facts.description}: an ADM UNet of {count / 1e6:.1f} M parameters for {size} images."
    yield ""
    if has_samples:
        yield f"![Samples of these weights, from fixed seeds]({SAMPLES})"
        yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| Paper | <{method.facts.paper}> |"


def _licence(license: str) -> Iterator[str]:
    yield "## Licence"
    yield ""
    if license == UNKNOWN:
        yield "Not stated. Whoever publishes these weights states it in the field `license` at the top, and here."
    else:
        yield f"`{license}`"
    yield ""


def _limits() -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield "The model reproduces what its training data shows, including the gaps and biases of that data. Its samples"
    yield "depict nothing real."
    yield ""


def _training_rows(config: Config, *, step: int) -> Iterator[str]:
    train = config.train
    yield f"| Steps | {step:,} of {train.total_steps:,} |"
    yield f"| Images seen | {step * train.global_batch_size:,} (global batch {train.global_batch_size:,}) |"
    yield f"| Optimizer | {config.optimizer.kind}, learning rate {config.optimizer.learning_rate:g} |"
    yield f"| Precision | {config.engine.precision} |"
    yield f"| Data | {without_folders(config.data.path)} |"


def _data_rows(dataset: DatasetManifest) -> Iterator[str]:
    made = f"preprocessing {dataset.preprocess}, encoding {dataset.encoding}"
    yield f"| Images in the data set | {dataset.count:,} of {without_folders(dataset.source)}, {made} |"
    yield f"| Fingerprint of the data set | `{dataset.fingerprint}` |"


def _config(config: Config, *, is_imported: bool) -> Iterator[str]:
    """The config as YAML; of imported weights only what describes the network and its preconditioning."""
    if is_imported:
        shown = config.model_dump(mode="json", include={"method": _PRECONDITIONING, "model": True})
        text = yaml.safe_dump(shown, sort_keys=False)
    else:
        text = dump_published(config)
    yield "## Config"
    yield ""
    yield "```yaml"
    yield without_folders(text.rstrip())
    yield "```"
    yield ""


def _is_of(evaluation: EvaluationResult, weights_sha256: str | None) -> bool:
    known = evaluation.protocol.get("weights_sha256")
    return None in (known, weights_sha256) or known == weights_sha256


def _left_out(others: int) -> Iterator[str]:
    """How many results of other weights that had this name are not shown."""
    if others:
        yield f"Left out: {_results(others)} of other weights that had this name."
        yield ""


def _quality(evaluations: Sequence[EvaluationResult]) -> Iterator[str]:
    """A table per score and reference of the results with the most samples, and the number of those left out."""
    if not evaluations:
        yield "Not evaluated."
        yield ""
        return
    shown: dict[tuple[str, str, str], list[EvaluationResult]] = {}
    for group in groups_of(evaluations):
        basis = basis_of(group[0])
        shown.setdefault((basis.score_name, group[0].features, basis.reference or ""), once_each(group))
    for group in shown.values():
        yield from _table(group)
        yield ""
    if left_out := len(evaluations) - sum(map(len, shown.values())):
        yield f"Left out: {_results(left_out)} of fewer samples or seeds. {RULE}"
        yield ""


def _results(count: int) -> str:
    return f"{count} result{'s' if count > 1 else ''}"


def _table(group: Sequence[EvaluationResult]) -> Iterator[str]:
    """One row per result and one column per metric that any of them has."""
    first = group[0]
    metrics = [metric for metric in all_metrics() if any(metric.name in each.metrics for each in group)]
    titles = " | ".join(metric.title_over(first.score_name) for metric in metrics)
    sha256 = str(first.reference.get("sha256") or "")
    hashed = f" (SHA-256 {sha256[:12]})" if sha256 else ""
    yield f"{describe_basis(first)}{hashed}; features {first.features}."
    yield ""
    yield f"| Network evaluations per sample | Times | Samples | Seeds | {titles} |"
    yield "|" + "---|" * (4 + len(metrics))
    for each in sorted(group, key=lambda each: each.nfe or 0):
        cells = " | ".join(_cell(each, metric) for metric in metrics)
        seeds = ", ".join(map(str, each.seeds))
        yield f"| {each.nfe} | {_times(each)} | {each.num_samples:,} | {seeds} | {cells} |"
    for line in dict.fromkeys(without_folders(line) for each in group for line in each.warnings):
        yield f"\n{line[:1].upper()}{line[1:]}."


def _times(evaluation: EvaluationResult) -> str:
    """The noise levels at which the network was evaluated; their number if they are many."""
    stated = evaluation.times or evaluation.protocol.get("sigmas") or ()
    times = [time for time in stated if time > 0]  # a diffusion model's times end with 0, where nothing is evaluated
    return ", ".join(f"{time:.4g}" for time in times) if len(times) <= SHOWN_TIMES else f"{len(times)} times"


def _cell(evaluation: EvaluationResult, metric: MetricDefinition) -> str:
    """The mean, and the standard deviation if there were several sets of samples."""
    measured = evaluation.metrics.get(metric.name)
    return "-" if measured is None else " ".join(metric.formatted(measured)).rstrip()
