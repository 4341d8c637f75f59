"""Runs training steps on DeepSpeed: the student, its target and teacher, and the guard against bad gradients."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from cmscale.config import Config, accumulation_steps
from cmscale.config.averages import power_exponent, power_name
from cmscale.distributed.world import World
from cmscale.engine import backend, settings, wrappers
from cmscale.engine.clock import ForwardClock
from cmscale.engine.flat_space import (
    count_elements,
    flat_part_size,
    flatten,
    number_parameters,
)
from cmscale.engine.float32_values import GatheredFloat32Values, copied_values
from cmscale.engine.frozen import FrozenNetwork, Network, PartitionedNetwork
from cmscale.engine.one_tensor import OneTensor
from cmscale.engine.optimizer import GuardedStep, build_optimizer
from cmscale.engine.shards import FlatShards, Read
from cmscale.model.compiled import uncompiled
from cmscale.runs.partition import Partition, own_range

_ALIGNMENT = 2  # elements per rank; DeepSpeed's own in stages 1 and 2


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on all ranks.

    Attributes:
        applied: whether the weights were updated.
        loss: mean over the global batch.
        grad_norm: Euclidean norm of the mean gradient, before clipping; inf if the step was not applied.
        loss_scale: fp16's loss scale during the step, 1 in other precisions.
    """

    applied: bool
    loss: float
    grad_norm: float
    loss_scale: float


class NonFiniteLoss(ArithmeticError):
    """Raised on every rank if the loss is not finite on one. The step was not applied, its gradients are dropped."""

    def __init__(self, *, ranks: list[int], losses: list[float]) -> None:
        named = ", ".join(f"rank {rank} has {losses[rank]}" for rank in ranks)
        super().__init__(f"the loss is not finite: {named}")
        self.ranks = ranks


class Engine:
    """A network in training, spread over the ranks by ZeRO.

    Args:
        build_network: returns a new network; called once for the student, once for the target.
        initial: named fp32 tensors to start from; None for the network's own initial values.
        has_target: whether the method has a target network.

    Raises:
        UserError: the device cannot compute in the precision, or DeepSpeed is not a version that is known.
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
        self._deepspeed = backend.import_deepspeed(config, world)
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
        self.parameters = number_parameters(module)
        self._part_size = flat_part_size(
            count_elements(self.parameters), num_ranks=world.num_ranks, alignment=_ALIGNMENT
        )
        self._partition = Partition(self.parameters, world.num_ranks, config.engine.zero_stage, self._part_size)
        start = flatten(dict(module.named_parameters()), self.parameters)
        self._float32 = self._gathered_values(module)
        trained = OneTensor(module) if config.engine.parameters == "joined" else module
        self._seen = number_parameters(trained)  # by DeepSpeed
        self._optimizer = build_optimizer(config.optimizer, trained.parameters())
        self._wrapped = backend.wrap(self._deepspeed, trained, config, world, optimizer=self._optimizer)
        self._wrapper = wrappers.wrapper_of(self._wrapped.optimizer, self._wrapped.module)
        self._scaler = self._wrapper.loss_scaler() if config.engine.precision == "fp16" else None
        self._guard = None
        if settings.is_plain(config):
            self._guard = GuardedStep(self._optimizer, clip=config.engine.gradient_clip)
        wrappers.prepare_moments(self._wrapper, self._optimizer)
        self._target = self._build_frozen(build_network, start) if has_target else None
        self.shards = self._build_shards()
        self.shards.set_masters(start)
        self.renew_network()

    @property
    def network(self) -> Network:
        """The student; called like the network itself."""
        return self._wrapped

    @property
    def target(self) -> Network | None:
        """The target network, with the weights of `shards`' quantity `target`; None if the method has none."""
        return self._target

    def add_frozen(
        self, name: str, state_dict: Mapping[str, torch.Tensor], build_network: Callable[[], nn.Module]
    ) -> Network:
        """Adds a network for evaluation only (a teacher), in the compute dtype; ZeRO-3 partitions it too. Collective.

        Raises:
            ValueError: the tensors do not fit the network; the message has `name` and the first difference.
        """
        module = build_network()
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state_dict.items()}
        for key in sorted(expected.keys() | given.keys()):
            if expected.get(key) != given.get(key):
                raise ValueError(
                    f"{name}: {key} is {given.get(key)} in the weights and {expected.get(key)} in the network"
                )
        frozen = self._build_frozen(build_network, flatten(state_dict, number_parameters(module)))
        frozen.module.eval()
        return frozen

    def step(self, micro_losses: Iterable[Callable[[], torch.Tensor]], learning_rate: float) -> StepResult:
        """Makes one step over the global batch. Collective.

        Args:
            micro_losses: per micro-batch of this rank a function that returns its mean loss (a scalar tensor).

        Raises:
            NonFiniteLoss: on every rank, if any rank's loss is not finite. The weights are as before.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        before = wrappers.scaler_state(self._scaler)
        # At stage 0 DeepSpeed 0.19.8 divides fp16's gradients by a loss scale that it never multiplied in.
        scale = before["cur_scale"] if self._scaler is not None and self._config.engine.zero_stage == 0 else 1.0
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        count = 0
        if not self._wrapped.module.training:  # setting it visits every layer
            self._wrapped.train()
        self.clock.start()
        for compute in micro_losses:
            loss = compute()
            if count == 0:
                self.clock.stop()
            count += 1
            total += loss.detach()
            if count == self._accumulation:
                # On the device, so that the host waits for nothing: a mean that is not finite makes the gradient NaN,
                # on every rank once it is reduced, and DeepSpeed drops the whole step's gradients, in every stage.
                loss = loss * torch.where(torch.isfinite(total), 1.0, math.nan)
            with self._unreduced():
                self._wrapped.backward(loss * scale)
            self._wrapped.step()
        if count != self._accumulation:
            raise ValueError(f"a step takes {self._accumulation} micro-batches, got {count}")
        applied = self._wrapped.was_step_applied() if self._guard is None else self._guard.applied
        losses = self._gather_losses(total / count)
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            assert not applied
            wrappers.restore_scaler(self._scaler, before)  # the loss scale is not the cause
            raise NonFiniteLoss(ranks=bad, losses=losses)
        if applied:
            self._renew_float32()
        norm = self._wrapped.get_global_grad_norm() if self._guard is None else self._guard.norm
        return StepResult(
            applied=applied,
            loss=math.fsum(losses) / len(losses),
            grad_norm=float(norm) / scale if applied and norm is not None else math.inf,
            loss_scale=before.get("cur_scale", 1.0),
        )

    def start_over(self) -> None:
        """Resets the optimizer, the EMAs and the target, and keeps the weights. Collective."""
        for counter in self._step_counters():
            counter.zero_()
        self.shards.start_over()

    @contextmanager
    def showing(self, quantity: str) -> Iterator[Network]:
        """Yields the student with another quantity's weights (an EMA, the target), to sample from. Collective."""
        flat = self.shards.full(quantity)
        kept = None if self._guard is None else self.shards.full("master")
        self._show(flat)
        del flat
        self._wrapped.eval()
        compiles = self._config.model.compile != "off"
        try:
            with torch.no_grad(), uncompiled() if compiles else contextlib.nullcontext():
                yield self._wrapped
        finally:
            self._wrapped.train()
            if kept is not None:  # without a wrapper the network's weights are the masters
                self._show(kept)
            else:
                self.renew_network()

    def scalars(self) -> dict[str, float]:
        """Numbers that a checkpoint holds in addition to the flat space: the optimizer's step, fp16's loss scaler."""
        return {"optimizer_step": float(self._step_counters()[0].item()), **wrappers.scaler_state(self._scaler)}

    def restore(self, read: Read, scalars: Mapping[str, float]) -> None:
        """Sets everything that a checkpoint holds, and the networks' weights with it. Collective."""
        for counter in self._step_counters():
            counter.fill_(scalars["optimizer_step"])
        wrappers.restore_scaler(self._scaler, dict(scalars) if "cur_scale" in scalars else {})
        self.shards.restore(read)
        self.renew_network()

    @torch.no_grad()
    def renew_network(self) -> None:
        """Derives the student's working weights from the fp32 masters. Collective."""
        self._wrapper.renew()
        self._renew_float32()
        wrappers.settle(self._world.device)

    def close(self) -> None:
        """Drops DeepSpeed's hooks and buffers, so that this process can build another engine."""
        self._wrapped.destroy()

    @torch.no_grad()
    def _show(self, flat: torch.Tensor) -> None:
        """Writes the whole flat space into the student's working weights."""
        self._wrapper.show(flat, self._seen, rank=self._world.rank)
        if self._float32 is not None:
            self._float32.copy(flat)
        wrappers.settle(self._world.device)

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
        if self.dtype != torch.float32:
            copied_values(module, flat, device=self._world.device)
        if self._config.engine.zero_stage == 3:
            return PartitionedNetwork(backend.wrap(self._deepspeed, module, self._config, self._world, optimizer=None))
        return FrozenNetwork(
            module,
            dtype=self.dtype,
            device=self._world.device,
            part_size=flat_part_size(offset, num_ranks=self._world.num_ranks, alignment=_ALIGNMENT),
            num_ranks=self._world.num_ranks,
        )

    def _build_shards(self) -> FlatShards:
        num_ranks, rank = self._world.num_ranks, self._world.rank
        return FlatShards(
            self.parameters,
            wrappers.find_pieces(self._wrapper, self._optimizer, parameters=self._seen, rank=rank, num_ranks=num_ranks),
            partition=self._partition,
            rank=rank,
            ema_rates=dict(zip(self._config.ema.names, self._config.ema.rates, strict=True)),
            power_exponents={power_name(length): power_exponent(length) for length in self._config.ema.lengths},
            has_target=self._target is not None,
            publish_target=None if self._target is None else self._publisher(self._target),
        )

    def _publisher(self, target: FrozenNetwork | PartitionedNetwork) -> Callable[[torch.Tensor], None]:
        """Sets the target network's weights from the fp32 elements that each rank has. Collective."""
        if isinstance(target, PartitionedNetwork):
            rank, num_ranks = self._world.rank, self._world.num_ranks
            ranges = [own_range(p, rank, num_ranks=num_ranks) for p in self.parameters]
            publish = partial(target.publish, own_lengths=[end - begin for begin, end in ranges])
        else:
            publish = target.publish
        values = self._gathered_values(target.module)

        def publish_all(local: torch.Tensor) -> None:
            publish(local)
            if values is not None:
                values.gather(local)

        return publish_all

    def _gathered_values(self, module: nn.Module) -> GatheredFloat32Values | None:
        """The values of the float32 layers of the student or the target; None if the whole network is float32."""
        if self.dtype == torch.float32:
            return None
        rank, device = self._world.rank, self._world.device
        return GatheredFloat32Values(module, self.parameters, partition=self._partition, rank=rank, device=device)

    def _renew_float32(self) -> None:
        """Sets the values of the student's float32 layers from the masters. Collective."""
        if self._float32 is not None:
            self._float32.gather(self.shards.local("master"))

    def _unreduced(self) -> contextlib.AbstractContextManager[None]:
        """Leaves the gradients where one rank has all of them: DeepSpeed copies them to send them to nobody."""
        if self._guard is not None and self._world.num_ranks == 1:
            return self._wrapped.no_sync()
        return contextlib.nullcontext()

    def _gather_losses(self, mean: torch.Tensor) -> list[float]:
        """Every rank's mean loss, by rank. The device has made the step by then. Collective."""
        own = mean.cpu().view(1)
        if self._world.num_ranks == 1:
            return own.tolist()
        gathered = [torch.zeros_like(own) for _ in range(self._world.num_ranks)]
        dist.all_gather(gathered, own)
        return [float(value) for value in gathered]

    def _step_counters(self) -> list[torch.Tensor]:
        return [state["step"] for state in self._optimizer.state.values()]
