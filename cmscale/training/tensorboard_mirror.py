"""Mirrors a run to TensorBoard: event files in the run's folder, of metrics, grids of samples and evaluations."""

from functools import partial
from pathlib import Path
from typing import Any

from cmscale.runs.folder import RunDir
from cmscale.runs.lineage import read_lineage
from cmscale.runs.results import EvaluationResult
from cmscale.training.mirror import Mark, Mirror, evaluation_names, finite


class TensorboardMirror(Mirror):
    """Writes a run's event files; every start begins a file of its own, with higher steps than those before."""

    def __init__(self, run: RunDir, *, only_news: bool = False) -> None:
        super().__init__(run, "tensorboard", partial(_open, run), only_news=only_news)


class TensorboardSink:
    """An open event file."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def record(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in finite(numbers).items():
            self._writer.add_scalar(f"training/{name}", value, step)

    def grid(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def evaluation(self, result: EvaluationResult) -> None:
        for name, value in evaluation_names(result).items():
            self._writer.add_scalar(name, value, result.step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _open(run: RunDir, mark: Mark) -> TensorboardSink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.tensorboard))
    if mark == Mark() and (origin := read_lineage(run)):
        writer.add_text("branch_of", str(origin), origin.step)
    return TensorboardSink(writer)
