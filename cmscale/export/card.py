"""The model card: a README.md that describes exported weights, their training and their quality."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, assert_never

import yaml

from cmscale.config import Config, MethodSection, dump_config
from cmscale.config.agreement import OPENAI
from cmscale.consistency.sampler import default_sigmas
from cmscale.errors import UserError
from cmscale.evaluation.metrics.registry import MetricDefinition, all_metrics
from cmscale.interop import parameter_shapes, pipeline_timesteps
from cmscale.io.place import without_folders
from cmscale.runs.comparison import RULE, basis_of, describe_basis, groups_of, once_each
from cmscale.runs.manifests import DatasetManifest
from cmscale.runs.results import EvaluationResult
from cmscale.source import IMPORTED

Format = Literal["safetensors", "openai", "diffusers"]

_SHOWN_TIMES = 8
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
) -> str:
    """The card of the weights `weights_name` at `step`.

    Args:
        weights_sha256: `Source.fingerprint`, to leave out evaluations of other weights that had this name; None for
            those of any.
        dataset: The manifest of the training data, if it is available.
        evaluations: Results of `cmscale evaluate`; those of other steps or weights are left out.
        format: That of the weights: the card says how its project samples as cmscale does.

    The card of imported weights says nothing about their training: their config only says how they are used here. Local
    paths are shortened to their last part.
    """
    is_imported = weights_name == IMPORTED
    lines = [
        *_heading(config),
        f"| Weights | {'imported from another project' if is_imported else weights_name} |",
        f"| Classes | {config.model.num_classes or 'none'} |",
        *([] if is_imported else _training_rows(config, step=step)),
        *([] if is_imported or dataset is None else _data_rows(dataset)),
        "",
        "## Quality",
        "",
        *_quality_of(evaluations, step=step, weights_name=weights_name, weights_sha256=weights_sha256),
        "",
        *_use(format, config.method),
        "## Limits",
        "",
        "The model reproduces what its training data shows, including the gaps and biases of that data. Its samples",
        "depict nothing real.",
        "",
        "## Config",
        "",
        "```yaml",
        without_folders(_shown_config(config, is_imported=is_imported).rstrip()),
        "```",
        "",
    ]
    return "\n".join(lines)


def _heading(config: Config) -> Iterator[str]:
    """Everything to the first row of the table of facts."""
    model, method = config.model, config.method
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    kind = "unconditional" if model.num_classes is None else "class-conditional"
    size = f"{model.image_size}x{model.image_size}"
    yield "---"
    yield f"tags: [image-generation, {kind}-image-generation, consistency-models]"
    yield "---"
    yield ""
    yield f"# {method.kind.upper()} at {size}"
    yield ""
    yield f"This is {method.facts.description}: an ADM UNet of {count / 1e6:.1f} M parameters for {size} images."
    yield ""
    yield "| | |"
    yield "|---|---|"


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


def _shown_config(config: Config, *, is_imported: bool) -> str:
    """The config as YAML; of imported weights only what describes the network and its preconditioning."""
    if not is_imported:
        return dump_config(config)
    shown = config.model_dump(mode="json", include={"method": _PRECONDITIONING, "model": True})
    return yaml.safe_dump(shown, sort_keys=False)


def _is_of(evaluation: EvaluationResult, weights_sha256: str | None) -> bool:
    known = evaluation.protocol.get("weights_sha256")
    return None in (known, weights_sha256) or known == weights_sha256


def _use(format: Format, method: MethodSection) -> Iterator[str]:
    """How the project of a format samples as `cmscale sample` does."""
    match format:
        case "safetensors":
            return
        case "openai":
            yield from _with_openai(method)
        case "diffusers":
            yield from _with_diffusers(method)
        case _:
            assert_never(format)


def _with_openai(method: MethodSection) -> Iterator[str]:
    """The arguments with which OpenAI's scripts compute the same function of the same weights."""
    mode = "consistency_distillation" if method.facts.preconditioning == "consistency" else "edm"
    yield "## Use with OpenAI's code"
    yield ""
    yield f"`--training_mode {mode} --sigma_min {method.sigma_min:g} --sigma_max {method.sigma_max:g}`"
    yield ""
    for caution in unlike_openai(method):
        yield f"{caution}."
        yield ""


def unlike_openai(method: MethodSection) -> list[str]:
    """What no argument of OpenAI's scripts sets as this method has it, one line each."""
    return [
        f"OpenAI's code takes {key} {theirs:g}, this model was trained with {ours:g}: as it is, that code computes "
        f"another function of these weights; construct its KarrasDenoiser with {key}={ours:g}"
        for key in ("sigma_data", "rho")
        if (ours := getattr(method, key)) != (theirs := getattr(OPENAI, key))
    ]


def _with_diffusers(method: MethodSection) -> Iterator[str]:
    """How diffusers' pipeline samples at the times that `cmscale sample` takes by default."""
    yield "## Use with diffusers"
    yield ""
    yield "```python"
    yield "pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(FOLDER)"
    yield "images = pipeline(num_inference_steps=None, timesteps=TIMESTEPS).images"
    yield "```"
    yield ""
    yield "From the same noise these timesteps give the images of `cmscale sample`:"
    yield ""
    for steps in (1, 2):
        try:
            sigmas = default_sigmas(method, steps).tolist()
        except UserError:  # no second time is known for this range of noise
            continue
        timesteps, times = pipeline_timesteps(method, sigmas)
        line = f"- `--steps {steps}`: `timesteps={timesteps}`"
        if any(abs(time / sigma - 1) > 1e-6 for time, sigma in zip(times, sigmas, strict=True)):
            given = ",".join(f"{time:.10g}" for time in times)
            line += (
                " is the nearest that the scheduler has; the same images come of "
                f"`cmscale sample --sampling-times {given}`"
            )
        yield line
    yield ""


def _quality_of(
    evaluations: Sequence[EvaluationResult], *, step: int, weights_name: str, weights_sha256: str | None
) -> Iterator[str]:
    """The quality of these weights, and how many results of others that had their name are left out."""
    named = [each for each in evaluations if each.step == step and each.weights == weights_name]
    mine = [each for each in named if _is_of(each, weights_sha256)]
    yield from _quality(mine)
    if others := len(named) - len(mine):
        yield f"Left out: {_results(others)} of other weights that had this name."
        yield ""


def _quality(evaluations: Sequence[EvaluationResult]) -> Iterator[str]:
    """A table per score and reference of the results with the most samples, and the number of those left out."""
    if not evaluations:
        yield "Not evaluated."
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
    times = evaluation.times or evaluation.protocol.get("sigmas") or ()
    return ", ".join(f"{time:.4g}" for time in times) if len(times) <= _SHOWN_TIMES else f"{len(times)} times"


def _cell(evaluation: EvaluationResult, metric: MetricDefinition) -> str:
    """The mean, and the standard deviation if there were several sets of samples."""
    measured = evaluation.metrics.get(metric.name)
    return "-" if measured is None else " ".join(metric.formatted(measured)).rstrip()
