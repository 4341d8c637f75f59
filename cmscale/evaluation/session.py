"""Measures sets of samples: draws them on all ranks in blocks, extracts features, and computes the metrics."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmscale import __version__
from cmscale.config import Evaluate
from cmscale.config.requests import MeasuringRequest
from cmscale.consistency.solver import Denoise
from cmscale.data import read_images
from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.engine.preemption import Preemption
from cmscale.errors import UserError
from cmscale.evaluation.blocks import BLOCK, BlockStore
from cmscale.evaluation.features.extractor import FeatureExtractor, build_features
from cmscale.evaluation.manifold import DENSITY_K, Manifold
from cmscale.evaluation.measure import measure_distributions, measure_neighbours
from cmscale.evaluation.progress import is_gone, must_be_there
from cmscale.evaluation.reference.reference import Reference, reference_from_images
from cmscale.evaluation.reference.registry import is_reference_file, read_reference
from cmscale.generation.draw import SampleRequest, advancing, draw_batch, evaluations_of, machine_of, protocol_of
from cmscale.generation.sample_set import Making
from cmscale.io.counting import Counting, counted
from cmscale.io.fetch import local_file
from cmscale.io.image_tensors import to_uint8
from cmscale.io.place import Place
from cmscale.io.storage import open_storage
from cmscale.runs.folder import step_name
from cmscale.runs.manifests import DATASET_MANIFEST, read_dataset_manifest
from cmscale.runs.named_files import refuse_too_many
from cmscale.source import Source

_PIXELS_PER_PASS = 1 << 20

PROTOCOL = 1
"""Number of the definitions of samples, features and metrics. A change of a definition that moves a number by more than
rounding (another preprocessing, another layer of a network, another estimator) raises it, so that values stored under
the old definitions are not reused.
"""


TIMEOUT_MINUTES = 120.0
"""Limit of collectives, which includes the time in which rank 0 measures a reference."""


@dataclass(frozen=True)
class EvaluationSession:
    """What all measurements of one command share: ranks, settings, features, and on rank 0 the reference.

    Every rank has the reference's hash, and its features for nearest neighbours (`manifold`), if there are enough.
    """

    world: World
    settings: Evaluate
    extractor: FeatureExtractor
    reference: Reference | None
    reference_sha256: str
    manifold: Manifold | None
    preemption: Preemption

    @classmethod
    def build(
        cls, request: MeasuringRequest, configured: Evaluate, world: World, *, data: str | None, preemption: Preemption
    ) -> "EvaluationSession":
        """Opens a session. Collective.

        Args:
            configured: The config's `evaluate` section; values of the request replace its own.
            data: The training data, which is the reference if neither names one.

        Raises:
            UserError: a setting is not allowed, or a file is missing.
        """
        settings = request.settings(configured)
        _, named = settings.weights()
        weights = None if named is None else local_file(named)
        extractor = build_features(settings.features, weights=weights, device=world.device)
        reference = collectives.on_main(lambda: load_reference(settings.reference or data, extractor))
        sha256 = collectives.from_main(None if reference is None else reference.sha256)
        manifold = shared_manifold(reference, extractor, world)
        return cls(world, settings, extractor, reference, sha256, manifold, preemption)

    def refuse_other_size(self, source: Source) -> None:
        """Raises UserError if the reference is of images of another size than a source's. Collective."""
        size = source.config.model.image_size
        reference = self.reference
        collectives.on_main(lambda: reference and reference.refuse_other_size((size, size), of="the model"))

    def measure_samples(
        self,
        source: Source,
        denoise: Denoise,
        draw: SampleRequest,
        *,
        work_dir: Path,
        label: str,
        kept: Making | None = None,
    ) -> dict[str, float] | None:
        """All metrics of the samples that `draw` describes, on every rank. Collective.

        Blocks or metrics that an interrupted call stored in `work_dir` are reused, if they were measured of the same
        samples against the same reference, with the same torch on the same kind of device.

        Args:
            kept: The set that keeps the samples, which are measured and kept together.

        Returns:
            None if a preemption interrupted; the finished blocks are kept.
        """
        draw = with_classes(source, draw)
        identity = {**self.identity(source, draw), **self.machine(), "seed": draw.seed}
        store = BlockStore(work_dir, identity=identity, num_samples=draw.num)
        keeps = kept if kept is not None and kept.known is None else None
        known = collectives.from_main(collectives.on_main(store.metrics))
        if known is not None and keeps is None:
            return known
        todo = collectives.from_main(collectives.on_main(store.missing))
        if keeps is not None:
            todo = sorted({*todo, *keeps.missing()}, key=lambda block: block.start)
        mine = todo[self.world.rank :: self.world.num_ranks]
        done, num_ranks = draw.num - sum(map(len, todo)), self.world.num_ranks
        gone = False
        counting = Counting(label, total=draw.num, done=done, unit="samples", active=self.world.is_main)
        with counting:  # what all ranks have drawn follows from rank 0's, as their shares are equal
            drawing = advancing(
                denoise,
                lambda count: counting.advance(count * num_ranks),
                evaluations=evaluations_of(source, draw),
            )
            for block in mine:
                if self.preemption.flagged:
                    break
                images = draw_block(source, drawing, draw, block, device=self.world.device)
                if keeps is not None:
                    keeps.commit(block, np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy()))
                features = self.extractor(images)
                if gone := is_gone(source.run_dir):
                    break
                store.commit(block, features)
                done += len(block) * num_ranks
                counting.set(done)
        must_be_there(source.run_dir, gone=collectives.any_rank(gone))
        if self.preemption.requested():
            return None
        if keeps is not None:
            keeps.finish({"source": source.origin, **kept_protocol(source, draw)})
        return self._measured(store, source)

    def identity(self, source: Source, draw: SampleRequest) -> dict[str, Any]:
        """What determines the metrics of the samples that `draw` describes, except their number and seeds."""
        draw = with_classes(source, draw)
        return {
            **protocol_of(source, draw),
            **self.features_protocol(),
            "reference_sha256": self.reference_sha256,
        }

    def machine(self) -> dict[str, Any]:
        """Rank 0's torch and device, by which results differ in their last digits. Collective."""
        machine = collectives.from_main(machine_protocol(self.world))
        return {name: value for name, value in machine.items() if name != "num_ranks"}

    def features_protocol(self) -> dict[str, Any]:
        """What determines the metrics of given images: the features' network, its weights, the code."""
        return {
            "features": self.extractor.label,
            "features_sha256": self.extractor.weights_sha256,
            "protocol": PROTOCOL,
            "cmscale": __version__,
        }

    def _measured(self, store: BlockStore, source: Source) -> dict[str, float]:
        """Computes distributions on rank 0, where the reference is, and neighbours on all ranks. Collective."""
        found, pooled = collectives.on_main(lambda: self._distributions(store, source)) or ({}, None)
        if collectives.from_main(self.world.is_main and pooled is None):
            return collectives.from_main(found)
        if self.manifold is not None and store.num_samples > DENSITY_K:
            features = collectives.array_from_main(pooled)
            found |= measure_neighbours(Manifold(features, device=self.world.device, world=self.world), self.manifold)

        def finish() -> None:
            must_be_there(source.run_dir)
            store.finish(found)

        collectives.on_main(finish)
        return collectives.from_main(found)

    def _distributions(self, store: BlockStore, source: Source) -> tuple[dict[str, float], np.ndarray | None]:
        """The metrics of distributions and the pooled features; all metrics, without features, if they are stored.

        They are stored by now if another command measured the same meanwhile and removed the blocks.
        """
        assert self.reference is not None, "rank 0 has the reference"
        try:
            return self._measured_distributions(store)
        except FileNotFoundError:
            must_be_there(source.run_dir)
            if (known := store.metrics()) is None:
                raise
            store.discard_blocks()
            return known, None

    def _measured_distributions(self, store: BlockStore) -> tuple[dict[str, float], np.ndarray]:
        assert self.reference is not None, "rank 0 has the reference"
        return measure_distributions(store.read(), num_samples=store.num_samples, reference=self.reference)


def with_classes(source: Source, draw: SampleRequest) -> SampleRequest:
    """The request with a random class per sample, if the network is class-conditional."""
    return draw if source.config.model.num_classes is None else replace(draw, classes="random")


def kept_protocol(source: Source, draw: SampleRequest) -> dict[str, Any]:
    """What determines the samples that an evaluation draws."""
    return {
        "step": source.step,
        "weights": source.weights_name,
        **protocol_of(source, with_classes(source, draw)),
        "seed": draw.seed,
        "num_samples": draw.num,
        "batch_size": f"of evaluations: {block_batch_size(source)} in blocks of {BLOCK}",
    }


def shared_manifold(reference: Reference | None, extractor: FeatureExtractor, world: World) -> Manifold | None:
    """Rank 0's reference for nearest neighbours, on every rank; None if it has too few features. Collective."""
    subset = None if reference is None else reference.subset
    if not collectives.from_main(subset is not None and len(subset) > DENSITY_K):
        return None
    return Manifold(collectives.array_from_main(subset), device=extractor.device, world=world)


def draw_block(
    source: Source, denoise: Denoise, draw: SampleRequest, block: range, *, device: torch.device
) -> torch.Tensor:
    """The block's samples as uint8.

    The batch size follows from the image size and the block alone: a convolution's rounding may depend on its batch,
    and a result must depend neither on the memory of a machine nor on the number of ranks.
    """
    size = block_batch_size(source)
    return torch.cat(
        [
            to_uint8(draw_batch(source, denoise, draw, indices=block[at : at + size], device=device))
            for at in range(0, len(block), size)
        ]
    )


def block_batch_size(source: Source) -> int:
    """Samples of a block that are drawn at once."""
    return max(1, _PIXELS_PER_PASS // source.config.model.image_size**2)


def load_reference(named: str | None, extractor: FeatureExtractor) -> Reference:
    """The reference statistics in a file, or those of a data set's or folder's images.

    Raises:
        UserError: `named` is None, nothing is there, or there are too many images to measure in every evaluation.
    """
    if named is None:
        raise UserError("evaluate: no reference; give --reference DATASET|FOLDER|FILE.npz")
    if is_reference_file(named) or Path(named).is_file():
        return replace(read_reference(local_file(named), extractor), name=named)
    storage = open_storage(named)
    if storage.read_if_present(DATASET_MANIFEST) is None:
        if storage.read_if_present("config.yaml") is not None:  # it may hold grids of samples
            raise UserError(f"reference {named}: is a run; give its data, a folder of images, or a statistics file")
        return read_reference(Place(named).local("a reference that is a folder of images"), extractor)
    manifest = read_dataset_manifest(storage)
    refuse_too_many(manifest.count, named=named)
    return reference_from_images(
        counted((image for image, _ in read_images(named)), f"reference {named}", total=manifest.count),
        extractor,
        name=f"{named.rstrip('/')} {manifest.fingerprint[:12]}",
        count=manifest.count,
        preprocess=manifest.preprocess,
        encoding=manifest.encoding,
        exif=manifest.exif,
    )


def machine_protocol(world: World) -> dict[str, Any]:
    """Torch and the device, which change a result by rounding, and the number of ranks."""
    return {**machine_of(world.device), "num_ranks": world.num_ranks}


def describe_step(source: Source) -> str:
    """A source's checkpoint and weights, for progress bars and printed results."""
    return f"{step_name(source.step)} {source.weights_name}"
