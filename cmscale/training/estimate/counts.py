"""Counts what a training step costs on one rank: its FLOP, and the bytes at the worst moment of a micro-batch.

The method's own loss runs forward and backward on the meta device, which computes shapes and no values. Nothing is
derived from a rule of thumb: another method, distance, or activation checkpointing is counted as it runs.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from cmscale.config import Config, Model, schedules
from cmscale.consistency.distance import Distance, build_distance, lpips_network
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.engine.flat_space import number_parameters
from cmscale.engine.float32_values import Float32Values
from cmscale.engine.optimizer import build_optimizer
from cmscale.engine.settings import COMPUTE_DTYPES
from cmscale.model.precondition import denoiser_for, teacher_denoiser_for
from cmscale.model.unet import UNet, build_unet
from cmscale.rng import sample_randomness
from cmscale.training.assemble import network_builder, network_function

META = torch.device("meta")
_NORMS = torch.ops.aten.native_group_norm.default, torch.ops.aten.native_group_norm_backward.default
Reduce = Callable[[int], int]
"""(elements of a gradient) -> bytes that its reduction takes for a moment."""


def no_reduction(numel: int) -> int:
    """The reduction of gradients that stay where they are."""
    del numel
    return 0


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the storages that operations make: those that live, and their maximum.

    Args:
        known: Tensors that are counted elsewhere; their views are not counted either.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.most = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._follow, out)
        return out

    def moment(self, more: int) -> None:
        """Counts `more` bytes that live for this moment only."""
        self.most = max(self.most, self.live + more)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._seen:
            return
        self._seen.add(place)
        size = storage.nbytes()
        self.live += size
        self.moment(0)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.live -= size


class KnownNorms(TorchDispatchMode):
    """Finds what a group normalization returns once for all with the same arguments.

    On the meta device torch computes it by dozens of operations in Python, which were half of a pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[Any, ...], list[tuple[torch.Size, torch.dtype] | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if kwargs or func not in _NORMS:
            return func(*args, **(kwargs or {}))
        key = func, *map(_kind, args)
        if key not in self._known:
            made = func(*args)
            self._known[key] = [None if tensor is None else _kind(tensor) for tensor in made]
            return made
        kinds = self._known[key]
        return tuple(None if kind is None else torch.empty(kind[0], dtype=kind[1], device=META) for kind in kinds)


def _kind(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype
    return tuple(argument) if isinstance(argument, list) else argument


def num_parameters(config: Config) -> int:
    """The parameters that a run trains, counted without allocating them."""
    return _numbers(config)[0]


def num_float32_values(config: Config) -> int:
    """The parameters that a network in a lower precision also holds in float32."""
    return 0 if config.engine.precision == "fp32" else _numbers(config)[1]


def _numbers(config: Config) -> tuple[int, int]:
    """All parameters of a run's network, and those that are float32 in any precision."""
    return _numbers_of(network_function(config), config.model)  # pyright: ignore[reportArgumentType]  # it is frozen


@lru_cache(maxsize=16)
def _numbers_of(build: Callable[..., UNet], model: Model) -> tuple[int, int]:
    """The numbers of a network, which is made once: a large one takes a while."""
    with META:
        network = build(model)
    parameters = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return sum(parameters.values()), sum(parameters[name] for name in network.float32_parameters)


def forward_flop(config: Config) -> int:
    """FLOP of a forward pass of the network per image."""
    size = config.model.image_size
    with META, FlopCounterMode(display=False) as counter, KnownNorms(), torch.no_grad():
        labels = None if config.model.num_classes is None else torch.zeros(1, dtype=torch.long)
        build_unet(_countable(config).model)(torch.zeros(1, 3, size, size), torch.zeros(1), labels=labels)
    return counter.get_total_flops()


@dataclass(frozen=True)
class OnMeta:
    """The loss of a micro-batch on the meta device; `compute` evaluates it, forward and backward.

    Attributes:
        known: The tensors that exist before it is computed: parameters, buffers, images.
    """

    student: nn.Module
    known: list[torch.Tensor]
    compute: Callable[[], None]


def micro_batch_peak(config: Config, *, size: int, activation_checkpointing: bool, reduce: Reduce) -> int:
    """Bytes at the worst moment of a micro-batch of `size` images, beside parameters and what stays between steps.

    Args:
        reduce: Called with the elements of each gradient as backward makes it; the gradient is then dropped, as
            gradients that stay are counted elsewhere. Called with 0 after backward.
    """
    prepared = on_meta(config, size=size, activation_checkpointing=activation_checkpointing)
    live = LiveBytes(prepared.known)

    def reduced(parameter: torch.Tensor) -> None:
        live.moment(reduce(parameter.numel()))
        parameter.grad = None

    for parameter in prepared.student.parameters():
        parameter.register_post_accumulate_grad_hook(reduced)
    with live:
        prepared.compute()
    live.moment(reduce(0))
    return live.most


def image_flop(config: Config, *, activation_checkpointing: bool = False) -> float:
    """FLOP of the loss per image, forward and backward; a multiplication and an addition count as two."""
    prepared = on_meta(config, size=1, activation_checkpointing=activation_checkpointing)
    with FlopCounterMode(display=False) as counter:
        prepared.compute()
    return counter.get_total_flops()


def on_meta(config: Config, *, size: int, activation_checkpointing: bool) -> OnMeta:
    """The networks and the loss of a micro-batch of `size` images at the end of training, as the engine has them."""
    changed = config.model.model_copy(update={"activation_checkpointing": activation_checkpointing})
    config = _countable(config.model_copy(update={"model": changed}))
    method, dtype = config.method, COMPUTE_DTYPES[config.engine.precision]
    student = _network(network_builder(config), dtype).train()
    target = _network(network_builder(config), dtype).train() if method.facts.has_target else None
    teacher = None
    if method.facts.follows_teacher:
        teacher = _network(partial(build_unet, config.model), dtype).eval()
    networks = Networks(
        student=denoiser_for(method, student),
        target=None if target is None else denoiser_for(method, _frozen(target)),
        teacher=None if teacher is None else teacher_denoiser_for(method, _frozen(teacher)),
    )
    distance = _distance(config)
    loss = build_loss(method, distance)
    values = schedules.at(config, config.train.total_steps - 1)
    side = config.model.image_size
    clean = torch.empty(size, 3, side, side, device=META)
    random = sample_randomness(config.train.random_numbers, seed=config.train.seed, positions=range(size), device=META)
    modules = [student, target, teacher, distance if isinstance(distance, nn.Module) else None]

    def compute() -> None:
        with KnownNorms():
            loss(networks, clean, values, random).mean().backward()

    known = [clean, *(tensor for module in modules if module is not None for tensor in _tensors(module))]
    return OnMeta(student, known, compute)


def optimizer_peak(config: Config, sizes: list[int], *, foreach: bool) -> int:
    """Bytes that the optimizer's step takes for a moment, over fp32 tensors of these sizes.

    Args:
        foreach: Whether it handles all tensors at once, as torch does on CUDA.
    """
    parameters = [nn.Parameter(torch.empty(size, device=META)) for size in sizes]
    optimizer = build_optimizer(config.optimizer, parameters)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    known: list[torch.Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad = torch.empty_like(parameter)
        known += [parameter, gradient]
        state = {"step": torch.tensor(1e6), "exp_avg": torch.empty_like(parameter)}
        optimizer.state[parameter] = {**state, "exp_avg_sq": torch.empty_like(parameter)}
    known += [tensor for state in optimizer.state.values() for tensor in state.values()]
    with LiveBytes(known) as live:
        optimizer.step()
    return live.most


def _countable(config: Config) -> Config:
    """The config with an attention that the meta device can run."""
    kind = "reference" if config.model.attention == "reference" else "sdpa"
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": kind})})


def _network(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    with META:
        network = build()
    network.to(dtype)
    if dtype != torch.float32:
        Float32Values(network, number_parameters(network), device=META)
    return network


def _frozen(network: Any) -> Callable[..., torch.Tensor]:
    network.requires_grad_(False)

    def evaluate(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return network(*args, **kwargs)

    return evaluate


def _distance(config: Config) -> Distance | None:
    settings = config.method.distance_settings
    if settings is not None and settings.name == "lpips":
        return lpips_network(settings, config.model.image_size).to(META)
    return build_distance(config.method, config.model.image_size)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    values = [value for each in module.modules() for value in (getattr(each, "_values", None) or {}).values()]
    return [*module.parameters(), *module.buffers(), *values]
