"""Writes the study's page: figures as PNG, a table in Markdown, and the HTML that shows them."""

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from study.plan import Study
from study.results import SAMPLING_STEPS, MethodResult, Spread, StudyResult

from cmscale.io.durable import replace_durably

COLOURS = ("#2f6fdb", "#d9722b", "#2a9d76", "#9a5fc4", "#c2456b", "#7f8a99", "#b08900", "#1b9aaa", "#6b4f3a", "#111111")
MARKERS = "osD^vPX*<>"
TILE, TILES = 64, 16  # pixels and number of the samples of one method
GAP = 2  # pixels between the tiles of a training's grid
HEADINGS = {1: "one step", 2: "two steps"}


def write_page(study: Study, result: StudyResult) -> Path:
    """Writes `page/` in the study's folder. Returns its index."""
    folder = study.out / "page"
    folder.mkdir(parents=True, exist_ok=True)
    table = rows(study, result)
    replace_durably(folder / "table.md", markdown(table).encode())
    draw_scores(result, folder / "fd.png")
    shown = draw_samples(result.methods, folder / "samples.png")
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    page = templates.get_template("page.html.j2").render(
        head=table[0],
        rows=table[1:],
        settings=study.settings,
        result=result,
        shown=shown,
        machine=machine(study.settings.device),
        slower=[
            f"{each.recipe.name} {each.evaluations_of_own}" for each in result.methods if each.evaluations_of_own > 1
        ],
    )
    replace_durably(folder / "index.html", page.encode())
    return folder / "index.html"


def machine(device: str) -> str:
    """The processor or GPU that is here, and torch's version."""
    version = f"torch {importlib.metadata.version('torch')}"
    if device == "cpu":
        return f"{processor()}, {version}"
    import torch

    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU here'}, {version}"


def processor() -> str:
    """The model of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores seen" if models else platform.machine()


def rows(study: Study, result: StudyResult) -> list[list[str]]:
    """The table, its heading first: a row for each method, and one for pictures that no method saw."""
    per_point = study.settings.steps_per_point * study.settings.batch
    table = [["recipe", "starts from", "seeds", "FD, one step", "FD, two steps", "ms a step", "GiB", "CPU s"]]
    for each in result.methods:
        scores = [each.last(steps, images_per_point=per_point) for steps in SAMPLING_STEPS]
        seeds = max((len(score.values) for score in scores if score), default=0)
        table.append([each.recipe.name, each.recipe.after or "", str(seeds), *map(_shown, scores), *_costs(each)])
        if each.own_sampler is not None:
            what = f"{each.recipe.name}, {each.evaluations_of_own} evaluations"
            table.append([what, "", str(len(each.own_sampler.values)), _shown(each.own_sampler), *4 * [""]])
    if result.held_out is not None:
        table.append(["other crops of the photographs", "", "", f"{result.held_out:.1f}", *4 * [""]])
    return table


def _shown(score: Spread | None) -> str:
    if score is None:
        return "-"
    return f"{score.mean:.1f}" + (f" ± {score.deviation:.1f}" if len(score.values) > 1 else "")


def _costs(each: MethodResult) -> list[str]:
    time = "-" if each.milliseconds is None else f"{each.milliseconds[0]:.0f} (least {each.milliseconds[1]:.0f})"
    memory = "-" if not each.peak_memory_gib else f"{each.peak_memory_gib:.2f}"
    return [time, memory, "-" if each.cpu_seconds is None else f"{each.cpu_seconds.mean:.0f}"]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is the heading."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


def draw_scores(result: StudyResult, path: Path) -> None:
    """The scores against images seen, a panel for each number of sampling steps."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        panels = figure.subplots(1, len(SAMPLING_STEPS), sharey=True)
        for axes, steps in zip(panels, SAMPLING_STEPS, strict=True):
            _panel(axes, result, steps)
            axes.set_title(HEADINGS[steps], loc="left")
            axes.set_xlabel("images seen")
        panels[0].set_ylabel(result.score)
        low, high = panels[0].get_ylim()
        if high < 4 * low:
            panels[0].set_yscale("linear")
        if result.held_out is not None:  # often far below; the curves decide which range is shown
            for axes in panels:
                label = f"other crops: {result.held_out:.1f}"
                axes.axhline(result.held_out, label=label, color="#555555", linewidth=1, linestyle=":")
            panels[0].set_ylim(low, high)
        named = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=110)


def _panel(axes: Axes, result: StudyResult, steps: int) -> None:
    for number, each in enumerate(result.methods):
        curve = each.curves.get(steps, {})
        if not curve and steps not in each.recipe.sampling_steps:
            continue
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.errorbar(
            list(curve),
            [score.mean for score in curve.values()],
            [score.deviation for score in curve.values()],
            label=each.recipe.name,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            capsize=3,
        )
        if each.own_sampler is not None:
            label = f"{each.recipe.name}, {each.evaluations_of_own} evaluations"
            axes.axhline(each.own_sampler.mean, label=label, color=colour, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    axes.grid(axis="y", which="both", linewidth=0.3, alpha=0.6)
    axes.margins(x=0.05)


def draw_samples(methods: Sequence[MethodResult], path: Path) -> list[str]:
    """Writes a row of samples for each method that has some. Returns their names in order."""
    shown = [each for each in methods if each.grid is not None]
    sheet = Image.new("RGB", (TILES * TILE, max(len(shown), 1) * TILE), "white")
    for row, each in enumerate(shown):
        assert each.grid is not None
        for column, tile in enumerate(tiles(each.grid)):
            sheet.paste(tile, (column * TILE, row * TILE))
    sheet.save(path, optimize=True)
    return [each.recipe.name for each in shown]


def tiles(grid: Path) -> list[Image.Image]:
    """The samples of a training's grid, row by row."""
    with Image.open(grid) as image:
        picture = image.convert("RGB")
    side = math.isqrt(TILES)
    pitch = (picture.width - GAP) // side
    corners = [(GAP + column * pitch, GAP + row * pitch) for row in range(side) for column in range(side)]
    size = pitch - GAP  # tiles are enlarged by a whole factor
    boxes = [(left, top, left + size, top + size) for left, top in corners]
    return [picture.crop(box).resize((TILE, TILE), Image.Resampling.NEAREST) for box in boxes]
