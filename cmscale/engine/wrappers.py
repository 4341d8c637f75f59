"""Knows where DeepSpeed's optimizer wrappers keep fp32 masters, working weights and the loss scale.

All of this is private to DeepSpeed. A table names the wrapper classes that are known; every attribute is read through
`private`. A class or an attribute that another version renamed is therefore an error, and never another layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from cmscale.engine.flat_space import Piece, count_elements
from cmscale.io.packages import private, qualified_name, unsupported
from cmscale.runs.manifests import MOMENTS, Parameter
from cmscale.runs.partition import own_range

_private = partial(private, package="deepspeed")
_SCALER_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter")


@dataclass(frozen=True)
class Run:
    """flat[start : start + end - begin] lies at [begin, end) of a tensor that the torch optimizer updates."""

    tensor: torch.Tensor
    begin: int
    end: int
    start: int


class Wrapper(Protocol):
    """One kind of DeepSpeed's optimizers, around the torch optimizer, for one network."""

    def masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the torch optimizer updates, as it knows them."""
        ...

    def runs(self, parameters: tuple[Parameter, ...], *, rank: int, num_ranks: int) -> Iterator[Run]:
        """Where in the masters of this rank the flat space's elements lie."""
        ...

    def renew(self) -> None:
        """Derives the network's working weights from the masters. Collective."""
        ...

    def show(self, flat: torch.Tensor, parameters: tuple[Parameter, ...], *, rank: int) -> None:
        """Writes the whole flat space into the working weights and leaves the masters as they are."""
        ...

    def loss_scaler(self) -> Any:
        """The object that holds fp16's dynamic loss scale. Call it in fp16 only."""
        ...


class Whole:
    """No wrapper (stage 0, fp32): the torch optimizer updates the network's parameters, on every rank all of them."""

    def __init__(self, optimizer: Any, module: torch.nn.Module) -> None:
        self._optimizer = optimizer
        self._module = module

    def masters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates, in fp32."""
        return list(self._module.parameters())

    def runs(self, parameters: tuple[Parameter, ...], *, rank: int, num_ranks: int) -> Iterator[Run]:
        """The runs of the flat space that this rank holds."""
        del rank, num_ranks
        for tensor, place in zip(self.masters(), parameters, strict=True):
            yield Run(tensor, 0, tensor.numel(), place.offset)

    def renew(self) -> None:
        """Computes the network's parameters anew after the masters were set."""
        pass

    def show(self, flat: torch.Tensor, parameters: tuple[Parameter, ...], *, rank: int) -> None:
        """Sets the network's parameters, and no masters, to those of the whole flat space."""
        del rank
        for parameter, place in zip(self._module.parameters(), parameters, strict=True):
            parameter.data.copy_(flat[place.offset : place.offset + parameter.numel()].view(parameter.shape))

    def loss_scaler(self) -> Any:
        """What scales the loss in fp16."""
        raise AssertionError("without a wrapper there is no fp16")


class WholeLowPrecision(Whole):
    """FP16_UnfusedOptimizer (stage 0, bf16 and fp16): fp32 copies of all parameters on every rank."""

    def masters(self) -> list[torch.Tensor]:
        return list(_private(self._optimizer, "fp32_groups")[0])

    def renew(self) -> None:
        for low, master in zip(_private(self._optimizer, "fp16_groups")[0], self.masters(), strict=True):
            low.data.copy_(master.data)

    def loss_scaler(self) -> Any:
        return _private(self._optimizer, "loss_scale_config")


class SplitFlat(Whole):
    """DeepSpeedZeroOptimizer (stages 1 and 2): each rank holds one run of the padded flat space."""

    def masters(self) -> list[torch.Tensor]:
        return list(_private(self._optimizer, "single_partition_of_fp32_groups"))

    def runs(self, parameters: tuple[Parameter, ...], *, rank: int, num_ranks: int) -> Iterator[Run]:
        del num_ranks
        (flat,) = self.masters()
        start, total = rank * flat.numel(), count_elements(parameters)
        if start < total:
            yield Run(flat, 0, min(flat.numel(), total - start), start)

    def renew(self) -> None:
        _private(self._optimizer, "update_lp_params")()

    def loss_scaler(self) -> Any:
        return _never_raising(_private(self._optimizer, "loss_scaler"))


class SplitParameters(Whole):
    """DeepSpeedZeroOptimizer_Stage3: every parameter is split over all ranks."""

    def masters(self) -> list[torch.Tensor]:
        return list(_private(self._optimizer, "fp32_partitioned_groups_flat"))

    def runs(self, parameters: tuple[Parameter, ...], *, rank: int, num_ranks: int) -> Iterator[Run]:
        places = dict(zip((id(p) for p in self._module.parameters()), parameters, strict=True))
        for group, flat in zip(_private(self._optimizer, "fp16_groups"), self.masters(), strict=True):
            at = 0
            for parameter in group:
                place = places[id(parameter)]
                begin, end = own_range(place, rank, num_ranks=num_ranks)
                if end > begin:
                    yield Run(flat, at, at + end - begin, place.offset + begin)
                at += partition_size(parameter)

    def renew(self) -> None:
        working = _private(self._optimizer, "fp16_partitioned_groups_flat")
        for low, master in zip(working, self.masters(), strict=True):
            low.data.copy_(master.data)

    def show(self, flat: torch.Tensor, parameters: tuple[Parameter, ...], *, rank: int) -> None:
        for parameter, place in zip(self._module.parameters(), parameters, strict=True):
            values = flat[place.offset : place.offset + torch.Size(place.shape).numel()]
            share = partition_size(parameter)
            own = values[rank * share : (rank + 1) * share]
            partition(parameter)[: own.numel()].copy_(own)

    def loss_scaler(self) -> Any:
        return _never_raising(_private(self._optimizer, "loss_scaler"))


_WRAPPERS: dict[str, Callable[[Any, torch.nn.Module], Wrapper]] = {
    "torch.optim.radam.RAdam": Whole,
    "torch.optim.adam.Adam": Whole,
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": WholeLowPrecision,
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": SplitFlat,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": SplitParameters,
}


def wrapper_of(optimizer: Any, module: torch.nn.Module) -> Wrapper:
    """The wrapper that DeepSpeed chose for a network.

    Raises:
        UnsupportedVersion: it is of a class that is not in the table.
    """
    name = qualified_name(type(optimizer))
    if name not in _WRAPPERS:
        raise unsupported(f"its optimizer is a {name}; known are {', '.join(_WRAPPERS)}", package="deepspeed")
    return _WRAPPERS[name](optimizer, module)


def prepare_moments(wrapper: Wrapper, optimizer: torch.optim.Optimizer) -> None:
    """Sets the torch optimizer to its state before the first step: some wrappers make a step when they are built."""
    for tensor in wrapper.masters():
        state = optimizer.state[tensor]
        state.clear()
        state["step"] = torch.tensor(0.0)
        for name in MOMENTS:
            state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)


def find_pieces(
    wrapper: Wrapper,
    optimizer: torch.optim.Optimizer,
    *,
    parameters: tuple[Parameter, ...],
    rank: int,
    num_ranks: int,
) -> list[Piece]:
    """All masters and moments on this rank, in the order of the flat space."""
    found = []
    for run in wrapper.runs(parameters, rank=rank, num_ranks=num_ranks):
        state = optimizer.state[run.tensor]
        sources = {"master": run.tensor.data} | {name: state[name] for name in MOMENTS}
        views = {name: source.view(-1)[run.begin : run.end] for name, source in sources.items()}
        found.append(Piece(run.start, views))
    return sorted(found, key=lambda piece: piece.start)


def partition(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter's working weights in stage 3, padded."""
    return _private(parameter, "ds_tensor").data


def partition_size(parameter: torch.nn.Parameter) -> int:
    """Elements per rank of a parameter in stage 3, padding included."""
    return _private(_private(parameter, "ds_tensor"), "ds_numel")


def settle(device: torch.device) -> None:
    """Waits for copies into working weights: DeepSpeed gathers them on a stream that does not wait for this one."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def scaler_state(scaler: Any) -> dict[str, float]:
    """The numbers of fp16's loss scaler, {} for None."""
    return {} if scaler is None else {name: float(_private(scaler, name)) for name in _SCALER_NUMBERS}


def restore_scaler(scaler: Any, state: dict[str, float]) -> None:
    """Sets the numbers that `scaler_state` returned."""
    if scaler is not None and state:
        scaler_state(scaler)  # so that setting a renamed attribute is an error
        scaler.cur_scale = state["cur_scale"]
        scaler.cur_iter = int(state["cur_iter"])
        scaler.last_overflow_iter = int(state["last_overflow_iter"])


def _never_raising(scaler: Any) -> Any:
    """ZeRO's loss scaler, set to skip a step that overflows at a scale of 1 too, where it would raise."""
    _private(scaler, "raise_error_at_min_scale")
    scaler.raise_error_at_min_scale = False
    return scaler
