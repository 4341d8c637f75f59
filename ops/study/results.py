"""Reads what the runs of a study measured: scores at each point, time and memory of a step, grids of samples."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from study.commands import Runner
from study.plan import POINTS, Recipe, Study

from cmscale.config import read_config
from cmscale.runs.folder import RunDir
from cmscale.runs.log import read_lines
from cmscale.runs.manifests import read_document
from cmscale.runs.results import EvaluationResult, read_evaluations

SAMPLING_STEPS = (1, 2)


@dataclass(frozen=True)
class Spread:
    """The scores of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds; 0 of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class MethodResult:
    """What one method measured.

    Attributes:
        curves: By number of sampling steps and by images seen, the scores of the seeds.
        own_sampler: Of the diffusion model: its scores by its own sampler, at the end.
        evaluations_of_own: Network evaluations of a sample unless a command says otherwise, as in the grid.
        milliseconds: Of a step, median and least over the logged stretches of the first finished seed.
        peak_memory_gib: Largest over the seeds.
        cpu_seconds: Of the trainings, with their starts, by seed.
        grid: Samples at the end of the first seed.
    """

    recipe: Recipe
    title: str
    curves: dict[int, dict[int, Spread]]
    own_sampler: Spread | None
    evaluations_of_own: int
    milliseconds: tuple[float, float] | None
    peak_memory_gib: float | None
    cpu_seconds: Spread | None
    grid: Path | None

    def last(self, steps: int, *, images_per_point: int) -> Spread | None:
        """The scores of the model that is meant for so many sampling steps."""
        point = self.recipe.last_point.get(steps, POINTS)
        return self.curves.get(steps, {}).get(point * images_per_point)


@dataclass(frozen=True)
class StudyResult:
    """All that the page shows. `held_out` is the score of pictures that no method saw; `score` its name."""

    methods: list[MethodResult]
    held_out: float | None
    score: str
    seeds: int


def read_results(study: Study, names: Sequence[str], seeds: int) -> StudyResult:
    """Reads the results of the study as far as it has come; methods without any are left out."""
    found = [result for name in names if (result := _of_method(study, study.recipes[name], seeds)) is not None]
    held_out, score = None, "FD"
    if study.held_out.exists():
        document = read_document(EvaluationResult, study.held_out.read_bytes(), origin=str(study.held_out))
        held_out, score = document.fid.mean, document.score_name
    return StudyResult(found, held_out, score, max((_seeds_of(each) for each in found), default=0))


def _seeds_of(result: MethodResult) -> int:
    return max((len(spread.values) for curve in result.curves.values() for spread in curve.values()), default=0)


def _of_method(study: Study, recipe: Recipe, seeds: int) -> MethodResult | None:
    scores: dict[int, dict[int, list[float]]] = {steps: {} for steps in SAMPLING_STEPS}
    own: list[float] = []
    runs = [RunDir(study.run(recipe.name, seed)) for seed in range(seeds)]
    runs = [run for run in runs if run.config.exists()]
    if not runs:
        return None
    config = read_config(runs[0].config, resolved=True)
    heun = config.method.facts.sampler == "ode"
    evaluations_of_own = 2 * config.method.default_sampling_steps - 1 if heun else config.method.default_sampling_steps
    for run in runs:
        for step, nfe, score in _scores(run, samples=study.settings.samples):
            steps = (nfe + 1) // 2 if heun else nfe
            if step in study.settings.points and steps in SAMPLING_STEPS:
                scores[steps].setdefault(step * study.settings.batch, []).append(score)
            elif step == study.settings.steps and nfe == evaluations_of_own:
                own.append(score)
    curves = {
        steps: {images: Spread(tuple(values)) for images, values in sorted(by_images.items())}
        for steps, by_images in scores.items()
    }
    grids = [path for run in runs for path in [run.sample_grid(study.settings.steps)] if path.exists()]
    return MethodResult(
        recipe=recipe,
        title=config.method.facts.title,
        curves=curves,
        own_sampler=Spread(tuple(own)) if own else None,
        evaluations_of_own=evaluations_of_own,
        milliseconds=_milliseconds(runs[0], batch=study.settings.batch),
        peak_memory_gib=max((line["peak_memory_gib"] or 0 for run in runs for line in _lines(run)), default=None),
        cpu_seconds=_cpu_seconds(study, runs),
        grid=grids[0] if grids else None,
    )


def _scores(run: RunDir, *, samples: int) -> Iterator[tuple[int, int, float]]:
    """Step, network evaluations and score of each evaluation of the study."""
    for result in read_evaluations(run)[0]:
        if result.num_samples == samples and result.times is None and result.step is not None and result.nfe:
            yield result.step, result.nfe, result.fid.mean


def _lines(run: RunDir) -> list[dict[str, float]]:
    return [line for line in read_lines(run.metrics) if "seconds" in line and "peak_memory_gib" in line]


def _milliseconds(run: RunDir, *, batch: int) -> tuple[float, float] | None:
    """Of a step: the median and the least over the logged stretches, but for the first, which holds the start."""
    values = [1000 * batch / line["images_per_second"] for line in _lines(run)[1:] if line["images_per_second"]]
    return (statistics.median(values), min(values)) if values else None


def _cpu_seconds(study: Study, runs: Sequence[RunDir]) -> Spread | None:
    """Of each finished training, all its starts together."""
    done, lines = Runner(study.out).done(), list(read_lines(Runner(study.out).record))
    names = [name for run in runs if (name := f"train {run.name}") in done]
    if not names:
        return None
    return Spread(tuple(sum(line["cpu_seconds"] for line in lines if line["name"] == name) for name in names))
