"""Makes a config's training step as a plain PyTorch loop: the same network, loss, optimizer and averages, no engine.

What a step of the framework takes beyond this loop is the framework's own overhead: DeepSpeed, the reduction of
gradients, the guard against bad ones, the ranks' agreement. In a lower precision or a stage above 0 the loop has what
ZeRO has: one flat float32 master, of which the network's weights are copies. Micro-batches are added up in the compute
dtype, as torch does.
"""

from dataclasses import replace

import torch
from torch import nn

from cmscale.config import accumulation_steps, schedules
from cmscale.config.averages import power_exponent, power_name, power_rate
from cmscale.config.schedules import ScheduleValues
from cmscale.data import Batch
from cmscale.engine.flat_space import number_parameters
from cmscale.engine.float32_values import Float32Values
from cmscale.engine.optimizer import build_optimizer
from cmscale.engine.settings import COMPUTE_DTYPES, is_plain
from cmscale.model.precondition import denoiser_for
from cmscale.training.assemble import Parts, in_training, network_builder


class PlainLoop:
    """A step on one rank, on the same batch as the engine's of `parts`."""

    def __init__(self, parts: Parts, batch: Batch) -> None:
        config, world = parts.config, parts.world
        assert world.num_ranks == 1
        self._config, self._batch = config, batch
        build = in_training(config, world, network_builder(config))
        network = build().to(world.device)
        masters = [parameter.detach() for parameter in network.parameters()]
        self._trained: list[torch.Tensor] = list(network.parameters())
        self._student = None
        if not is_plain(config):
            masters = [torch.cat([master.flatten() for master in masters])]
            self._trained = [nn.Parameter(masters[0])]
            self._student = _Copied(network, masters[0], dtype=COMPUTE_DTYPES[config.engine.precision])
        self._masters = masters
        self._optimizer = build_optimizer(config.optimizer, self._trained)  # pyright: ignore[reportArgumentType]
        self._averages = {name: [master.clone() for master in masters] for name in self._rates(None)}
        self._target: list[torch.Tensor] | None = None
        self._copied_target: _Copied | None = None
        if parts.networks.target is not None:
            frozen = build().to(world.device).requires_grad_(False)
            self._averages["target"] = [master.clone() for master in masters]
            self._target = list(frozen.parameters())
            if self._student is not None:
                self._copied_target = _Copied(frozen, masters[0], dtype=COMPUTE_DTYPES[config.engine.precision])
            target = denoiser_for(config.method, frozen)
        else:
            target = None
        networks = replace(parts.networks, student=denoiser_for(config.method, network), target=target)
        self._parts = replace(parts, networks=networks)

    def __call__(self) -> None:
        values = schedules.at(self._config, self._config.train.total_steps - 1)
        self._optimizer.param_groups[0]["lr"] = values.learning_rate
        number = accumulation_steps(self._config, num_ranks=1)
        for compute in self._parts.micro_losses(self._batch, values):
            (compute() / number).backward()
        if self._student is not None:
            self._trained[0].grad = self._student.gradient()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._student is not None:
            self._student.renew(self._masters[0])
        self._average(values)

    def flats(self) -> dict[str, torch.Tensor]:
        """The master and the averages, each as one tensor."""
        found = {"master": self._masters, **self._averages}
        return {name: torch.cat([tensor.flatten() for tensor in tensors]) for name, tensors in found.items()}

    @torch.no_grad()
    def _average(self, values: ScheduleValues) -> None:
        for name, rate in self._rates(values).items():
            torch._foreach_lerp_(self._averages[name], self._masters, 1.0 - rate)
        if self._target is not None:
            average = self._averages["target"]
            if self._copied_target is not None:
                self._copied_target.renew(average[0])
            else:
                torch._foreach_copy_(self._target, average)

    def _rates(self, values: ScheduleValues | None) -> dict[str, float]:
        """Every average with its rate at a step; without one, the averages alone."""
        ema = self._config.ema
        step = 0 if values is None else values.step
        rates = dict(zip(ema.names, ema.rates, strict=True))
        rates |= {power_name(length): power_rate(power_exponent(length), step + 1) for length in ema.lengths}
        if values is not None and "target" in self._averages:
            assert values.target_ema is not None
            rates["target"] = values.target_ema
        return rates


class _Copied:
    """A network with the weights of a flat float32 master, rounded in a lower precision."""

    def __init__(self, network: nn.Module, master: torch.Tensor, *, dtype: torch.dtype) -> None:
        self._parameters: list[torch.Tensor] = list(network.to(dtype).parameters())
        places, rounds = number_parameters(network), dtype != torch.float32
        self._values = Float32Values(network, places, device=master.device) if rounds else None
        self.renew(master)

    @torch.no_grad()
    def renew(self, master: torch.Tensor) -> None:
        parts = master.split([parameter.numel() for parameter in self._parameters])
        views = [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]
        torch._foreach_copy_(self._parameters, views)
        if self._values is not None:
            self._values.copy(master)

    def gradient(self) -> torch.Tensor:
        """The flat gradient in float32, and none left in the network."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return torch.cat([gradient.flatten() for gradient in gradients]).float()
