"""Keeps the samples of an evaluation: `--keep-samples`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from cmscale.config import Config
from cmscale.config.requests import EvaluateRequest
from cmscale.consistency.sampler import num_evaluations
from cmscale.errors import UserError
from cmscale.evaluation.blocks import BLOCK
from cmscale.evaluation.session import EvaluationSession, kept_protocol
from cmscale.generation.draw import SampleRequest
from cmscale.generation.sample_set import Making, opened
from cmscale.io.place import Place
from cmscale.runs.folder import step_name
from cmscale.runs.results import EvaluationResult, hash_of
from cmscale.runs.sample_sets import SetPlace, read_record, set_place
from cmscale.source import Source


class KeptSets:
    """The sets of samples that one evaluation keeps, one per seed; none without `--keep-samples`."""

    def __init__(
        self, request: EvaluateRequest, source: Source, session: EvaluationSession, draw: SampleRequest
    ) -> None:
        self._request, self._source, self._session, self._draw = request, source, session, draw

    @contextmanager
    def opened(self, seed: int) -> Iterator[Making | None]:
        """The set of a seed, for this command alone; None if samples are not kept. Collective.

        Raises:
            UserError: other samples are there, or the same that another kind of machine has drawn.
        """
        if self._request.keep_samples is None:
            yield None
            return
        place, machine = self._place(seed), self._session.machine()
        key = hash_of({**kept_protocol(self._source, self._of(seed)), "format": place.format})
        world = self._session.world
        with opened(place, key=key, machine=machine, count=self._draw.num, part_size=BLOCK, world=world) as making:
            if making.known is not None:
                drawn_by = {name: value for name, value in making.known.machine.items() if name != "num_ranks"}
                if drawn_by != machine:
                    raise UserError(
                        f"--keep-samples {place.place}: these samples were drawn by {drawn_by}, and may differ in "
                        "their rounding from those that are measured now; give another place"
                    )
            yield making

    def records(self) -> list[dict[str, Any]]:
        """Seed, place and hash of each set that is there. Rank 0 only."""
        if self._request.keep_samples is None:
            return []
        found = []
        for seed in range(self._request.seeds):
            place = self._place(seed)
            if (raw := place.record.read_if_present()) is not None:
                record = read_record(raw, origin=place.record)
                found.append({"seed": seed, "place": place.place, "sha256": record.sha256})
        return found

    def differ(self, result: EvaluationResult) -> bool:
        """Whether sets are to be kept that a result does not name, or that are gone. Rank 0 only."""
        return self._request.keep_samples is not None and (
            list(result.kept_samples) != self.records() or len(result.kept_samples) != self._request.seeds
        )

    def _of(self, seed: int) -> SampleRequest:
        return replace(self._draw, seed=seed)

    def _place(self, seed: int) -> SetPlace:
        request, source = self._request, self._source
        assert request.keep_samples is not None
        if request.num_evaluations * request.seeds == 1:
            return set_place(request.keep_samples, request.kept_format)
        nfe = nfe_of(source.config, self._draw)
        name = f"{step_name(source.step)}-{source.weights_name}-nfe{nfe}-seed{seed}"
        return set_place(Place(f"{request.keep_samples.rstrip('/')}/{name}"), request.kept_format)


def nfe_of(config: Config, draw: SampleRequest) -> int:
    """Network evaluations per sample."""
    steps = draw.steps if draw.sigmas is None else int(torch.count_nonzero(draw.sigmas))
    default = config.method.default_sampling_steps
    return num_evaluations(config.method, steps or default, draw.sampler)
