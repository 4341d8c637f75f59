"""Holds this rank's elements of the flat fp32 space: views of masters and moments, the EMAs, the target."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from cmscale.config.averages import power_rate
from cmscale.config.schedules import ScheduleValues
from cmscale.distributed.compat import all_gather_flat
from cmscale.engine.flat_space import Piece, count_elements
from cmscale.runs.manifests import MOMENTS, Parameter
from cmscale.runs.partition import Partition


class Read(Protocol):
    """Returns flat[start : start + length] of a quantity, float32 on the CPU."""

    def __call__(self, quantity: str, start: int, length: int) -> torch.Tensor: ...


class FlatShards:
    """The quantities that a checkpoint holds, on this rank.

    `master`, `exp_avg` and `exp_avg_sq` are views of DeepSpeed's own tensors. `target` and the EMAs are kept here, in
    fp32, for the elements of this rank alone, so that an update needs no communication.
    """

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        pieces: list[Piece],
        *,
        partition: Partition,
        rank: int,
        ema_rates: Mapping[str, float],
        power_exponents: Mapping[str, float] | None = None,
        has_target: bool,
        publish_target: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.parameters = parameters
        self.num_elements = count_elements(parameters)
        self.partition = partition
        self.segments = partition[rank]
        self._held = pieces
        self._owned = [
            piece.part(segment.start, segment.start + segment.length)
            for segment in self.segments
            for piece in pieces
            if piece.start < segment.start + segment.length and segment.start < piece.start + piece.length
        ]
        self._ema_rates = dict(ema_rates)
        self._power_exponents = dict(power_exponents or {})
        self._publish_target = publish_target
        device = pieces[0].views["master"].device if pieces else torch.device("cpu")
        size = sum(segment.length for segment in self.segments)
        names = (["target"] if has_target else []) + list(ema_rates) + list(self._power_exponents)
        self._followers = {name: torch.zeros(size, device=device) for name in names}
        self._masters = [piece.views["master"] for piece in self._owned]
        lengths = [piece.length for piece in self._owned]
        self._views = {name: list(flat.split(lengths)) for name, flat in self._followers.items()} if lengths else {}
        self.reset_followers()

    @property
    def quantities(self) -> tuple[str, ...]:
        """`master`, both moments, `target` if the method has one, and each average by name."""
        return ("master", *MOMENTS, *self._followers)

    @property
    def power_averages(self) -> tuple[str, ...]:
        """The averages by a power function, of which snapshots are kept."""
        return tuple(self._power_exponents)

    @torch.no_grad()
    def local(self, quantity: str) -> torch.Tensor:
        """This rank's elements of a quantity, [sum of segment lengths] float32 on the device."""
        if quantity in self._followers:
            return self._followers[quantity]
        views = [piece.views[quantity] for piece in self._owned]
        if len(views) == 1:
            return views[0]
        return torch.cat(views) if views else torch.zeros(0)

    @torch.no_grad()
    def reset_followers(self) -> None:
        """Sets the EMAs and the target to the masters, as at the start of training. Collective with a target."""
        for views in self._views.values():
            torch._foreach_copy_(views, self._masters)
        self.publish_target()

    @torch.no_grad()
    def start_over(self) -> None:
        """Zeroes the moments, and sets the EMAs and the target to the masters. Collective with a target."""
        for piece in self._held:
            for name in MOMENTS:
                piece.views[name].zero_()
        self.reset_followers()

    @torch.no_grad()
    def update(self, values: ScheduleValues) -> None:
        """Updates the EMAs and the target after an applied step: average <- rate average + (1 - rate) master, in fp32.

        The target's rate is the step's mu(k), that of an average by a power function its beta. The target network then
        gets the new weights. Collective with a target.
        """
        rates = dict(self._ema_rates)
        rates |= {name: power_rate(gamma, values.step + 1) for name, gamma in self._power_exponents.items()}
        if "target" in self._followers:
            if values.target_ema is None:
                raise ValueError(f"step {values.step}: a run with a target network needs a target_ema")
            rates["target"] = values.target_ema
        for name, rate in rates.items():
            if name in self._views:
                torch._foreach_lerp_(self._views[name], self._masters, 1.0 - rate)
        self.publish_target()

    def publish_target(self) -> None:
        """Sets the target network's weights, in its compute dtype. Collective with a target."""
        if self._publish_target is not None:
            self._publish_target(self._followers["target"])

    @torch.no_grad()
    def full(self, quantity: str) -> torch.Tensor:
        """All of a quantity, [num_elements] float32 on the device, on every rank. Collective."""
        local = self.local(quantity)
        if len(self.partition) == 1:
            return local.clone()
        longest = max(map(self.partition.length, range(len(self.partition))))
        sent = local.new_zeros(longest)
        sent[: local.numel()] = local
        gathered = local.new_empty(len(self.partition) * longest)
        all_gather_flat(gathered, sent)
        whole = local.new_empty(self.num_elements)
        for part, segments in zip(gathered.view(-1, longest), self.partition, strict=True):
            for segment in segments:
                whole[segment.start : segment.start + segment.length] = part[segment.at : segment.at + segment.length]
        return whole

    @torch.no_grad()
    def restore(self, read: Read) -> None:
        """Sets every quantity from `read`. Collective with a target.

        The student's working weights stay as they are: see `Engine.renew_network`.
        """
        for quantity in ("master", *MOMENTS):
            for piece in self._held:
                piece.views[quantity].copy_(read(quantity, piece.start, piece.length))
        for name, flat in self._followers.items():
            for segment in self.segments:
                flat[segment.at : segment.at + segment.length] = read(name, segment.start, segment.length)
        self.publish_target()

    @torch.no_grad()
    def set_masters(self, flat: torch.Tensor) -> None:
        """Sets the masters, the EMAs and the target from the whole flat space (float32, on any device)."""
        for piece in self._held:
            piece.views["master"].copy_(flat[piece.start : piece.start + piece.length])
        self.reset_followers()
