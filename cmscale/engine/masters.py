"""Owns the knowledge of where DeepSpeed keeps what: fp32 masters and moments, in each stage and precision.

Checked against deepspeed 0.19.8. Parameters are numbered in model order through one flat space without
padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cmscale.runs.manifests import Parameter, Segment

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """flat[start : start + length] on this rank: 1-D fp32 views of master and moments, by quantity."""

    start: int
    views: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        return self.views["master"].numel()

    def part(self, begin: int, end: int) -> "Piece":
        """The piece's overlap with flat[begin : end]."""
        low, high = max(begin, self.start) - self.start, min(end, self.start + self.length) - self.start
        return Piece(self.start + low, {name: view[low:high] for name, view in self.views.items()})


def number_parameters(module: torch.nn.Module) -> tuple[Parameter, ...]:
    """The flat space of a network (before DeepSpeed partitions it)."""
    offset = 0
    found = []
    for name, parameter in module.named_parameters():
        found.append(Parameter(name=name, shape=tuple(parameter.shape), offset=offset))
        offset += parameter.numel()
    return tuple(found)


def count_elements(parameters: tuple[Parameter, ...]) -> int:
    """The length of the flat space."""
    return sum(torch.Size(parameter.shape).numel() for parameter in parameters)


def flat_part_size(num_elements: int, *, num_ranks: int, alignment: int) -> int:
    """How many elements of the padded flat space a rank holds, one run a rank (stages 0 to 2)."""
    multiple = alignment * num_ranks
    return (num_elements + multiple - 1) // multiple * multiple // num_ranks


def own_range(parameter: Parameter, rank: int, *, num_ranks: int) -> tuple[int, int]:
    """Which of a parameter's elements a rank holds in stage 3: [begin, end) within the parameter."""
    numel = torch.Size(parameter.shape).numel()
    share = -(-numel // num_ranks)
    return min(rank * share, numel), min((rank + 1) * share, numel)


def segments_of_rank(
    parameters: tuple[Parameter, ...], rank: int, *, num_ranks: int, zero_stage: int, part_size: int
) -> tuple[Segment, ...]:
    """The runs of the flat space that a rank owns: one in stages 0 to 2, one a parameter in stage 3."""
    total = count_elements(parameters)
    if zero_stage < 3:
        runs = [(rank * part_size, min((rank + 1) * part_size, total))]
    else:
        ranges = [(p.offset, own_range(p, rank, num_ranks=num_ranks)) for p in parameters]
        runs = [(offset + begin, offset + end) for offset, (begin, end) in ranges]
    segments, at = [], 0
    for begin, end in runs:
        if end > begin:
            segments.append(Segment(start=begin, length=end - begin, at=at))
            at += end - begin
    return tuple(segments)


def prepare_moments(wrapped: Any, optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> None:
    """Puts the optimizer where no step was made: some of DeepSpeed's wrappers make one at their start."""
    for tensor in _master_tensors(wrapped, module):
        state = optimizer.state[tensor]
        state.clear()
        state["step"] = torch.tensor(0.0)
        for name in MOMENTS:
            state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)


def find_pieces(
    wrapped: Any,
    optimizer: torch.optim.Optimizer,
    module: torch.nn.Module,
    *,
    parameters: tuple[Parameter, ...],
    rank: int,
    num_ranks: int,
) -> list[Piece]:
    """All masters and moments on this rank, in the order of the flat space."""
    total = count_elements(parameters)
    found = []
    if hasattr(wrapped, "fp32_partitioned_groups_flat"):  # stage 3: every parameter is split over all ranks
        offsets = dict(zip((id(p) for p in module.parameters()), parameters, strict=True))
        for group, flat in zip(wrapped.fp16_groups, wrapped.fp32_partitioned_groups_flat, strict=True):
            at = 0
            for parameter in group:
                place = offsets[id(parameter)]
                begin, end = own_range(place, rank, num_ranks=num_ranks)
                if end > begin:
                    found.append(_piece(optimizer, flat, slice(at, at + end - begin), start=place.offset + begin))
                at += parameter.ds_tensor.ds_numel
    elif hasattr(wrapped, "single_partition_of_fp32_groups"):  # stages 1 and 2: the flat space is split
        (flat,) = wrapped.single_partition_of_fp32_groups
        start = rank * flat.numel()
        if start < total:
            found.append(_piece(optimizer, flat, slice(0, min(flat.numel(), total - start)), start=start))
    else:  # stage 0: everything on every rank
        for tensor, place in zip(_master_tensors(wrapped, module), parameters, strict=True):
            found.append(_piece(optimizer, tensor, slice(None), start=place.offset))
    return sorted(found, key=lambda piece: piece.start)


def _master_tensors(wrapped: Any, module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that the torch optimizer updates."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(wrapped, attribute):
            yield from getattr(wrapped, attribute)
            return
    if hasattr(wrapped, "fp32_groups"):  # stage 0 in low precision (FP16_UnfusedOptimizer)
        yield from wrapped.fp32_groups[0]
    else:
        yield from module.parameters()


def _piece(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, within: slice, *, start: int) -> Piece:
    state = optimizer.state[tensor]
    sources = {"master": tensor.data} | {name: state[name] for name in MOMENTS}
    return Piece(start, {name: source.view(-1)[within] for name, source in sources.items()})


# Loss scaling -----------------------------------------------------------------------------------------------


def loss_scaler(wrapped: Any) -> Any:
    """The object that holds fp16's dynamic loss scale, or None in other precisions."""
    for attribute in ("loss_scale_config", "loss_scaler"):
        scaler = getattr(wrapped, attribute, None)
        if scaler is not None and getattr(scaler, "last_overflow_iter", None) is not None:
            return scaler
    return None


def keep_going_at_smallest_scale(scaler: Any) -> None:
    """Has overflow at a loss scale of 1 skip the step, as at any other, instead of raising; nothing for None."""
    if scaler is not None:
        scaler.raise_error_at_min_scale = False


def settle(device: torch.device) -> None:
    """Waits for copies into partitions: DeepSpeed gathers them on a stream of its own, which waits for none of ours."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def scaler_state(scaler: Any) -> dict[str, float]:
    """The loss scaler's numbers (fp16), {} for None."""
    names = ("cur_scale", "cur_iter", "last_overflow_iter")
    return {} if scaler is None else {name: float(getattr(scaler, name)) for name in names}


def restore_scaler(scaler: Any, state: dict[str, float]) -> None:
    """Sets what `scaler_state` gave."""
    if scaler is not None and state:
        scaler.cur_scale = state["cur_scale"]
        scaler.cur_iter = int(state["cur_iter"])
        scaler.last_overflow_iter = int(state["last_overflow_iter"])
