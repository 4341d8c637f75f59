"""Names everything in a run's folder: no other module spells a path of a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_MANIFEST = "manifest.json"
EXPORTED_HOMES = "homes"
"""The folder in a run's exports that says where the run trains."""
_NAMED_TIMES = 4  # of a sampler in a file's name, which file systems limit to 255 bytes
_KEY_LENGTH = 12  # hex digits
_MARK_LENGTH = 16
_MARK = re.compile(rf"\.[0-9a-f]{{{_MARK_LENGTH}}}(?=\.safetensors$)")


def step_name(step: int) -> str:
    """`step-000000500`, the name of a step in every folder; names sort by step."""
    return f"step-{step:09d}"


def exported_home(number: int) -> str:
    """`homes/000001.json`, the record of the first folder in which an exported run trained."""
    return f"{EXPORTED_HOMES}/{number:06d}.json"


def step_of(name: str) -> int:
    """The step in a name that begins as `step_name` makes it; what follows the digits is ignored."""
    return int(name.removeprefix("step-")[:9])


def exported_weights(step: int, weights: str) -> str:
    """The name within a run of a file of its weights."""
    return f"exports/{step_name(step)}-{_plain(weights)}.safetensors"


def finished_samples_evaluation(source: str, *, features: str, num_samples: int, reference: str, key: str) -> str:
    """The name of the file for a result of finished samples; `source` is their file or folder."""
    stem = _plain(source.rstrip("/").rpartition("/")[2].removesuffix(".npz")) or "samples"
    what = f"{_plain(features)}-n{num_samples}-ref{reference[:8]}"
    return f"{stem}-evaluation-{what}-{key[:_KEY_LENGTH]}.json"


def _plain(text: str) -> str:
    """A part of a file's name from what a user or a foreign file calls something."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)[:60]


def rank_file(rank: int, num_ranks: int) -> str:
    """`rank-0000-of-0002.safetensors`, the file of one rank in a checkpoint."""
    return f"rank-{rank:04d}-of-{num_ranks:04d}.safetensors"


def copied_file(name: str, sha256: str) -> str:
    """The name of a file of a checkpoint in a copy: with its hash, so that no other content gets this name.

    A name that has the hash already stays: the checkpoint was itself brought back from a copy.
    """
    stem, dot, ending = name.rpartition(".")
    mark = f".{sha256[:_MARK_LENGTH]}"
    return name if stem.endswith(mark) else f"{stem}{mark}{dot}{ending}"


def original_file(name: str) -> str:
    """The name of a checkpoint's file without the hash that a copy's has."""
    return _MARK.sub("", name)


@dataclass(frozen=True)
class RunDir:
    """The folder of a run, with the path of every file in it."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.yaml"

    @property
    def placement(self) -> Path:
        """Where the newest job of the run was sent."""
        return self.root / "placement.json"

    @property
    def home(self) -> Path:
        """What tells this folder apart from others that continue the same exported run."""
        return self.root / "home.json"

    @property
    def provenance(self) -> Path:
        """What each start ran with: command, code, packages, hosts."""
        return self.root / "provenance.json"

    @property
    def code(self) -> Path:
        """Copies of the program, one per version that was submitted."""
        return self.root / "code"

    @property
    def metrics(self) -> Path:
        """The numbers of the steps, one JSON record per line."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened, one JSON record per line."""
        return self.root / "events.jsonl"

    @property
    def wandb_id(self) -> Path:
        """The id of the run at wandb."""
        return self.root / "wandb_id"

    @property
    def tensorboard(self) -> Path:
        """Event files for TensorBoard."""
        return self.root / "tensorboard"

    @property
    def prometheus(self) -> Path:
        """The newest numbers, for Prometheus."""
        return self.root / "metrics.prom"

    def mirror_mark(self, name: str) -> Path:
        """What a mirror of the run has been sent."""
        return self.logs / f"mirrored-{_plain(name)}.json"

    @property
    def generation(self) -> Path:
        """The number of starts of the run; only its newest start may commit checkpoints."""
        return self.root / "generation.json"

    @property
    def generations(self) -> Path:
        """One file per start, named by its number."""
        return self.root / "generations"

    def claimed_generation(self, number: int) -> Path:
        """The file by which a start has claimed a generation."""
        return self.generations / f"{number:06d}"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.checkpoints / step_name(step)

    @property
    def snapshots(self) -> Path:
        """Averages by a power function, in the format of checkpoints."""
        return self.root / "snapshots"

    def snapshot(self, step: int) -> Path:
        """The folder of the averages of a step."""
        return self.snapshots / step_name(step)

    @property
    def samples(self) -> Path:
        """The folder of sample grids."""
        return self.root / "samples"

    def sample_grid(self, step: int) -> Path:
        """The sample grid of a step."""
        return self.samples / f"{step_name(step)}.png"

    @property
    def real_images(self) -> Path:
        """A grid of training images, to see samples beside."""
        return self.samples / "real.png"

    @property
    def teacher_samples(self) -> Path:
        """A grid of the teacher's samples, if somebody drew one."""
        return self.samples / "teacher.png"

    @property
    def edits(self) -> Path:
        """Pictures that the report shows as edits made with the run's network."""
        return self.root / "edits"

    def edit(self, task: str, images: Sequence[str], *, step: int) -> Path:
        """A picture of an edit of images with these names; the same edit at another seed replaces it."""
        more = f"_and_{len(images) - 1}_more" if len(images) > 1 else ""
        named = f"_{_plain(images[0])}{more}" if images else ""
        return self.edits / f"{task}{named}_step_{step}.png"

    @property
    def evaluations(self) -> Path:
        """The folder of results."""
        return self.root / "evaluations"

    @property
    def evaluation_progress(self) -> Path:
        """Partial results of evaluations: blocks of features, and the metrics of each finished seed."""
        return self.evaluations / ".blocks"

    def evaluation(
        self,
        *,
        step: int,
        weights: str,
        nfe: int,
        times: Sequence[float] = (),
        features: str,
        num_samples: int,
        seeds: int,
        reference: str,
        key: str,
    ) -> Path:
        """The file of a result. Results whose numbers may differ have different names.

        Args:
            times: The sampler's, if they were given.
            features: The label of the feature network.
            seeds: How many sets of samples.
            reference: The hash of the reference.
            key: The hash of all that determines the numbers, also of what no other part of the name tells apart.
        """
        at = f"-at-{'-'.join(f'{time:.5g}' for time in times[:_NAMED_TIMES])}" if times else ""
        more = f"-and-{len(times) - _NAMED_TIMES}" if len(times) > _NAMED_TIMES else ""
        sampling = f"{_plain(weights)}-nfe{nfe}{at}{more}"
        against = f"ref{reference[:8]}-{key[:_KEY_LENGTH]}"
        name = f"{step_name(step)}-{sampling}-{_plain(features)}-n{num_samples}-seeds{seeds}-{against}.json"
        return self.evaluations / name

    def time_search(
        self,
        *,
        step: int,
        weights: str,
        steps: int,
        features: str,
        num_samples: int,
        seed: int,
        reference: str,
        key: str,
    ) -> Path:
        """The file of a search for `steps` times; as for `evaluation`, but with one seed."""
        what = f"{_plain(weights)}-steps{steps}-{_plain(features)}-n{num_samples}-seed{seed}"
        name = f"{step_name(step)}-{what}-ref{reference[:8]}-{key[:_KEY_LENGTH]}.json"
        return self.evaluations / "times" / name

    @property
    def consistency_errors(self) -> Path:
        """The folder of measured consistency errors."""
        return self.evaluations / "consistency"

    def consistency_error(self, *, step: int, weights: str, num_samples: int, seed: int, key: str) -> Path:
        """The file of a consistency error; `key` also tells apart the data and the teacher."""
        what = f"{_plain(weights)}-n{num_samples}-seed{seed}-{key[:_KEY_LENGTH]}"
        return self.consistency_errors / f"{step_name(step)}-{what}.json"

    @property
    def logs(self) -> Path:
        """The folder of logs."""
        return self.root / "logs"

    @property
    def launcher_sign(self) -> Path:
        """Touched by a living launcher every few seconds."""
        return self.logs / ".launcher.json"

    def asked_evaluation(self, step: int, checkpoint: str = "") -> Path:
        """A marker: the evaluation of this step was submitted.

        Args:
            checkpoint: The hash of the checkpoint; older versions wrote markers without.
        """
        of = f"-{checkpoint[:_KEY_LENGTH]}" if checkpoint else ""
        return self.logs / "evaluations-asked" / f"{step_name(step)}{of}"

    def profile_trace(self, step: int) -> Path:
        """The trace of the steps from this one on, for chrome://tracing and Perfetto."""
        return self.logs / f"profile-{step_name(step)}.trace.json.gz"

    def profile_table(self, step: int) -> Path:
        """The dearest operators of these steps."""
        return self.logs / f"profile-{step_name(step)}.txt"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.root / "report" / "index.html"
