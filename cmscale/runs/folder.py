"""Names everything in a run's folder: no other module spells a path of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    """`step-000000500`, the name of a step in every folder; names sort by step."""
    return f"step-{step:09d}"


def step_of(name: str) -> int:
    """The step in a name that begins as `step_name` makes it; what follows the digits is ignored."""
    return int(name.removeprefix("step-")[:9])


def rank_file(rank: int, num_ranks: int) -> str:
    """`rank-0000-of-0002.safetensors`, the file of one rank in a checkpoint."""
    return f"rank-{rank:04d}-of-{num_ranks:04d}.safetensors"


@dataclass(frozen=True)
class RunDir:
    """The folder of a run, with the path of every file in it."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def placement(self) -> Path:
        """Where the newest job of the run was sent."""
        return self.root / "placement.json"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def wandb_id(self) -> Path:
        return self.root / "wandb_id"

    @property
    def generation(self) -> Path:
        """The number of starts of the run; only its newest start may commit checkpoints."""
        return self.root / "generation.json"

    @property
    def generations(self) -> Path:
        """One file per start, named by its number."""
        return self.root / "generations"

    def claimed_generation(self, number: int) -> Path:
        return self.generations / f"{number:06d}"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    def sample_grid(self, step: int) -> Path:
        return self.samples / f"{step_name(step)}.png"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    @property
    def evaluation_progress(self) -> Path:
        """Partial results of evaluations: blocks of features, and the metrics of each finished seed."""
        return self.evaluations / ".blocks"

    def evaluation(self, *, step: int, weights: str, nfe: int, times: Sequence[float] = ()) -> Path:
        """The file of a result; `times` are the sampler's, if they were given."""
        at = f"-at-{'-'.join(f'{time:.5g}' for time in times)}" if times else ""
        return self.evaluations / f"{step_name(step)}-{weights}-nfe{nfe}{at}.json"

    def time_search(self, *, step: int, weights: str, steps: int) -> Path:
        return self.evaluations / "times" / f"{step_name(step)}-{weights}-steps{steps}.json"

    @property
    def consistency_errors(self) -> Path:
        return self.evaluations / "consistency"

    def consistency_error(self, *, step: int, weights: str) -> Path:
        return self.consistency_errors / f"{step_name(step)}-{weights}.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def launcher_sign(self) -> Path:
        """Touched by a living launcher every few seconds."""
        return self.logs / ".launcher.json"

    def asked_evaluation(self, step: int) -> Path:
        """A marker: the evaluation of this step was submitted."""
        return self.logs / "evaluations-asked" / step_name(step)

    @property
    def report(self) -> Path:
        return self.root / "report" / "index.html"
