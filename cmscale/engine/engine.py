"""Owns the training step on DeepSpeed: the student, its companions, and what never reaches the weights."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cmscale.config import Config, accumulation_steps
from cmscale.distributed.collectives import bound_collectives
from cmscale.distributed.world import World
from cmscale.engine import masters, settings
from cmscale.engine.clock import ForwardClock
from cmscale.engine.frozen import FrozenNetwork, Network, PartitionedNetwork
from cmscale.engine.optimizer import GuardedStep, build_optimizer
from cmscale.engine.shards import FlatShards, Read, flatten


@dataclass(frozen=True)
class StepResult:
    """What a step did. All ranks hold the same values."""

    applied: bool
    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Euclidean norm of the mean gradient, before clipping; inf where the step was not applied."""
    loss_scale: float
    """fp16's loss scale during the step, 1 in other precisions."""


class NonFiniteLoss(ArithmeticError):
    """The loss was not finite on some rank; the step was not applied, its gradients are dropped."""

    def __init__(self, *, ranks: list[int], losses: list[float]) -> None:
        named = ", ".join(f"rank {rank} has {losses[rank]}" for rank in ranks)
        super().__init__(f"the loss is not finite: {named}")
        self.ranks = ranks


class Engine:
    """A network in training, spread over the ranks by ZeRO.

    Args:
        build_network: gives the network; called once for the student, once for the target.
        initial: named fp32 tensors to start from; the network's own initial values where None.
        has_target: whether the method has a target network.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        build_network: Callable[[], nn.Module],
        initial: Mapping[str, torch.Tensor] | None = None,
        *,
        has_target: bool = False,
    ) -> None:
        settings.check_precision(config, world.device)
        self._deepspeed = _import_deepspeed(world)
        self._config = config
        self._world = world
        self.dtype = settings.COMPUTE_DTYPES[config.engine.precision]
        self._accumulation = accumulation_steps(config, num_ranks=world.num_ranks)
        self.clock = ForwardClock(world.device)
        module = build_network()
        if initial is not None:
            module.load_state_dict(initial)
        if any(True for _ in module.buffers()):
            raise ValueError("a network with buffers: checkpoints hold parameters only")
        self.parameters = masters.number_parameters(module)
        self._num_elements = masters.count_elements(self.parameters)
        self._alignment = 2  # elements a rank; DeepSpeed's, for stages 1 and 2
        self._part_size = masters.flat_part_size(
            self._num_elements, num_ranks=world.num_ranks, alignment=self._alignment
        )
        start = flatten(dict(module.named_parameters()), self.parameters)
        self._optimizer = build_optimizer(config.optimizer, module.parameters())
        self._wrapped = self._initialize(module, optimizer=self._optimizer)
        if settings.is_plain(config):
            GuardedStep(self._optimizer, clip=config.engine.gradient_clip)
        masters.keep_going_at_smallest_scale(masters.loss_scaler(self._wrapped.optimizer))
        masters.prepare_moments(self._wrapped.optimizer, self._optimizer, self._wrapped.module)
        self._target = self._build_frozen(build_network, start) if has_target else None
        self.shards = self._build_shards()
        self.shards.set_masters(start)
        self.renew_network()

    @property
    def network(self) -> Network:
        """The student, called as the network is."""
        return self._wrapped

    @property
    def target(self) -> Network | None:
        """The target network, whose weights follow `shards`' target; None where the method has none."""
        return self._target

    @property
    def applied_steps(self) -> int:
        """How many updates the optimizer has made since it last started."""
        return int(self._step_counters()[0].item())

    def add_frozen(
        self, name: str, state_dict: Mapping[str, torch.Tensor], build_network: Callable[[], nn.Module]
    ) -> Network:
        """A network for evaluation only (a teacher), in the compute dtype; partitioned too under ZeRO-3.

        Raises:
            ValueError: the tensors are not this network's; names the network and the first difference.
        """
        module = build_network()
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state_dict.items()}
        for key in sorted(expected.keys() | given.keys()):
            if expected.get(key) != given.get(key):
                raise ValueError(
                    f"{name}: {key} is {given.get(key)} in the weights and {expected.get(key)} in the network"
                )
        frozen = self._build_frozen(build_network, flatten(state_dict, masters.number_parameters(module)))
        frozen.module.eval()
        return frozen

    def step(self, micro_losses: Iterable[Callable[[], torch.Tensor]], learning_rate: float) -> StepResult:
        """One step over the global batch. Collective.

        Args:
            micro_losses: for each micro-batch of this rank a function that computes its mean loss (a scalar).

        Raises:
            NonFiniteLoss: on every rank, where any rank's loss is not finite. The weights are as before.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        scaler = masters.loss_scaler(self._wrapped.optimizer)
        before = masters.scaler_state(scaler)
        # at stage 0 DeepSpeed 0.19.8 divides fp16's gradients by a loss scale that it never multiplied in
        scale = before["cur_scale"] if scaler is not None and self._config.engine.zero_stage == 0 else 1.0
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        losses: list[float] = []
        count = 0
        self._wrapped.train()
        self.clock.start()
        for compute in micro_losses:
            loss = compute()
            if count == 0:
                self.clock.stop()
            count += 1
            total += loss.detach()
            if count == self._accumulation:
                losses = self._gather_losses(total / count)
                if not all(map(math.isfinite, losses)):
                    loss = loss * math.nan  # DeepSpeed then drops the whole step's gradients, in every stage
            self._wrapped.backward(loss * scale)
            self._wrapped.step()
        if count != self._accumulation:
            raise ValueError(f"a step takes {self._accumulation} micro-batches, got {count}")
        applied = self._wrapped.was_step_applied()
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            assert not applied
            masters.restore_scaler(scaler, before)  # the scale is not to blame
            raise NonFiniteLoss(ranks=bad, losses=losses)
        norm = self._wrapped.get_global_grad_norm()
        return StepResult(
            applied=applied,
            loss=math.fsum(losses) / len(losses),
            grad_norm=float(norm) / scale if applied and norm is not None else math.inf,
            loss_scale=before.get("cur_scale", 1.0),
        )

    def start_over(self) -> None:
        """Keeps the weights: the optimizer is as before its first step, the averages begin anew. Collective."""
        for counter in self._step_counters():
            counter.zero_()
        self.shards.start_over()

    @contextmanager
    def showing(self, quantity: str) -> Iterator[Network]:
        """The student with another quantity's weights (an EMA, the target), to sample from. Collective."""
        flat = self.shards.full(quantity)
        kept = self.shards.full("master") if settings.is_plain(self._config) else None
        self._show(flat)
        del flat
        self._wrapped.eval()
        try:
            with torch.no_grad():
                yield self._wrapped
        finally:
            self._wrapped.train()
            if kept is not None:  # here the network's weights are the masters themselves
                self._show(kept)
            else:
                self.renew_network()

    def scalars(self) -> dict[str, float]:
        """What a checkpoint holds beside the flat space: the optimizer's step and fp16's loss scaler."""
        scaler = masters.scaler_state(masters.loss_scaler(self._wrapped.optimizer))
        return {"optimizer_step": float(self._step_counters()[0].item()), **scaler}

    def restore(self, read: Read, scalars: Mapping[str, float]) -> None:
        """Sets all that a checkpoint holds; the networks follow. Collective."""
        for counter in self._step_counters():
            counter.fill_(scalars["optimizer_step"])
        scaler = masters.loss_scaler(self._wrapped.optimizer)
        masters.restore_scaler(scaler, dict(scalars) if "cur_scale" in scalars else {})
        self.shards.restore(read)
        self.renew_network()

    @torch.no_grad()
    def renew_network(self) -> None:
        """Derives the student's working weights from the fp32 masters. Collective."""
        wrapped = self._wrapped.optimizer
        if hasattr(wrapped, "fp32_partitioned_groups_flat"):
            for low, master in zip(
                wrapped.fp16_partitioned_groups_flat, wrapped.fp32_partitioned_groups_flat, strict=True
            ):
                low.data.copy_(master.data)
        elif hasattr(wrapped, "update_lp_params"):
            wrapped.update_lp_params()
        elif hasattr(wrapped, "fp32_groups"):
            for low, master in zip(wrapped.fp16_groups[0], wrapped.fp32_groups[0], strict=True):
                low.data.copy_(master.data)
        masters.settle(self._world.device)

    def close(self) -> None:
        """Drops DeepSpeed's hooks and buffers, so that another engine may follow in this process."""
        self._wrapped.destroy()

    @torch.no_grad()
    def _show(self, flat: torch.Tensor) -> None:
        """Writes the whole flat space into the student's working weights."""
        for parameter, place in zip(self._wrapped.module.parameters(), self.parameters, strict=True):
            numel = torch.Size(place.shape).numel()
            values = flat[place.offset : place.offset + numel]
            if self._config.engine.zero_stage == 3:
                share = parameter.ds_tensor.ds_numel
                own = values[self._world.rank * share : (self._world.rank + 1) * share]
                parameter.ds_tensor.data[: own.numel()].copy_(own)
            else:
                parameter.data.copy_(values.view(parameter.shape))
        masters.settle(self._world.device)

    def _initialize(self, module: nn.Module, *, optimizer: torch.optim.Optimizer | None) -> Any:
        common: dict[str, Any] = {"num_elements": masters.count_elements(masters.number_parameters(module))}
        if optimizer is not None:
            told = settings.deepspeed_settings(
                self._config, num_ranks=self._world.num_ranks, device=self._world.device, **common
            )
        else:
            told = settings.frozen_settings(self._config, device=self._world.device, **common)
        wrapped, *_ = self._deepspeed.initialize(
            model=module, optimizer=optimizer, config=told, dist_init_required=False
        )
        bound_collectives(timeout_minutes=self._config.engine.collective_timeout_minutes)
        return wrapped

    def _build_frozen(
        self, build_network: Callable[[], nn.Module], flat: torch.Tensor
    ) -> FrozenNetwork | PartitionedNetwork:
        module = build_network()
        offset = 0
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(flat[offset : offset + parameter.numel()].view(parameter.shape))
                offset += parameter.numel()
        module.requires_grad_(False)
        if self._config.engine.zero_stage == 3:
            return PartitionedNetwork(self._initialize(module, optimizer=None))
        return FrozenNetwork(
            module,
            dtype=self.dtype,
            device=self._world.device,
            part_size=masters.flat_part_size(offset, num_ranks=self._world.num_ranks, alignment=self._alignment),
            num_ranks=self._world.num_ranks,
        )

    def _build_shards(self) -> FlatShards:
        stage, num_ranks, rank = self._config.engine.zero_stage, self._world.num_ranks, self._world.rank
        segments = tuple(
            masters.segments_of_rank(
                self.parameters, other, num_ranks=num_ranks, zero_stage=stage, part_size=self._part_size
            )
            for other in range(num_ranks)
        )
        publish = None
        if isinstance(self._target, PartitionedNetwork):
            ranges = [masters.own_range(p, rank, num_ranks=num_ranks) for p in self.parameters]
            publish = partial(self._target.publish, own_lengths=[end - begin for begin, end in ranges])
        elif self._target is not None:
            publish = self._target.publish
        return FlatShards(
            self.parameters,
            masters.find_pieces(
                self._wrapped.optimizer,
                self._optimizer,
                self._wrapped.module,
                parameters=self.parameters,
                rank=rank,
                num_ranks=num_ranks,
            ),
            segments_by_rank=segments,
            rank=rank,
            ema_rates=dict(zip(self._config.ema.names, self._config.ema.rates, strict=True)),
            has_target=self._target is not None,
            publish_target=publish,
        )

    def _gather_losses(self, mean: torch.Tensor) -> list[float]:
        """Every rank's mean loss, by rank: the one wait for the device in a step."""
        own = mean.cpu().view(1)
        if self._world.num_ranks == 1:
            return own.tolist()
        gathered = [torch.zeros_like(own) for _ in range(self._world.num_ranks)]
        dist.all_gather(gathered, own)
        return [float(value) for value in gathered]

    def _step_counters(self) -> list[torch.Tensor]:
        return [state["step"] for state in self._optimizer.state.values()]


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, told before its import which device it serves, almost silent, compiling nothing."""
    os.environ.setdefault("LOCAL_RANK", str(world.rank_of_node))
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # DeepSpeed still calls two collectives by the names that torch 2.14 renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # on CPUs it would compile a shared-memory collective at its first start, for a minute, where gloo serves
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
