"""Evaluates finished samples: an `.npz` with `arr_0`, or a folder of images."""

import time
from pathlib import Path

from cmscale.config import Evaluate
from cmscale.config.requests import EvaluateRequest
from cmscale.distributed.world import World
from cmscale.engine.preemption import Preemption
from cmscale.evaluation.image_set import ImageSet
from cmscale.evaluation.measure import image_blocks, measure
from cmscale.evaluation.outcome import known_result, make_result, print_result, write_result
from cmscale.evaluation.progress import Progress, existing
from cmscale.evaluation.sample_files import open_images
from cmscale.evaluation.session import EvaluationSession
from cmscale.generation.pixel_hash import PixelHash
from cmscale.io.counting import counted
from cmscale.io.place import Place
from cmscale.runs.folder import finished_samples_evaluation
from cmscale.runs.results import EvaluationResult, hash_of


def evaluate_images(request: EvaluateRequest, world: World, *, preemption: Preemption) -> Place:
    """Measures finished samples and returns the result's file; one of the same pixels that exists is returned as it is.

    The default file lies in the working directory.
    """
    started = time.monotonic()
    images = open_images(request.source)
    session = EvaluationSession.build(request, Evaluate(), world, data=None, preemption=preemption)
    reference = session.reference
    assert reference is not None, "a world of one has the reference"
    reference.refuse_other_size((images.height, images.width), of=request.source)
    place = _Place(request, images, session)
    if (found := place.known()) is not None:
        return found
    place.of("").check_output()
    pixels = PixelHash()
    blocks = image_blocks(pixels.passing(counted(images.read(), "features", total=images.count)), session.extractor)
    measured = measure(blocks, num_samples=images.count, reference=reference)
    sha256 = pixels.hexdigest()
    out = place.of(sha256)
    result = make_result(
        session,
        [measured],
        num_samples=images.count,
        key=place.key(sha256),
        seconds=time.monotonic() - started,
        protocol={"source": images.name},
        comparison=[
            *images.notes(),
            *reference.mismatches(
                preprocess=None, encoding=images.encoding, size=(images.height, images.width), of="samples"
            ),
        ],
        samples={
            "name": images.name,
            "sha256": sha256,
            "image_size": [images.height, images.width],
            "encoding": images.encoding,
        },
    )
    write_result(result, out)
    print_result(result)
    return out


class _Place:
    """Where the result of finished samples goes, which depends on their pixels."""

    def __init__(self, request: EvaluateRequest, images: ImageSet, session: EvaluationSession) -> None:
        self._request, self._images, self._session = request, images, session

    def key(self, samples_sha256: str) -> str:
        identity = {**self._session.features_protocol(), "reference_sha256": self._session.reference_sha256}
        return hash_of({**identity, "samples_sha256": samples_sha256, "num_samples": self._images.count})

    def of(self, samples_sha256: str) -> Place:
        if self._request.out is not None:
            return self._request.out
        return Place(self._named(self.key(samples_sha256)))

    def known(self) -> Place | None:
        """The file of a result of the same pixels. They are read for it only if there is a result to compare."""
        if self._request.out is None:
            is_there = any(Path().glob(self._named("*")))
        else:
            is_there = existing(EvaluationResult, self._request.out) is not None
        if not is_there:
            return None
        pixels = PixelHash()
        images = counted(self._images.read(), "comparing with the earlier result", total=self._images.count)
        for _ in pixels.passing(images):
            pass
        sha256 = pixels.hexdigest()
        out, progress = self.of(sha256), Progress.of(self._request, Path())
        return None if known_result(out, key=self.key(sha256), progress=progress) is None else out

    def _named(self, key: str) -> str:
        session, images = self._session, self._images
        return finished_samples_evaluation(
            self._request.source,
            features=session.extractor.label,
            num_samples=images.count,
            reference=session.reference_sha256,
            key=key,
        )
