"""Builds what a training step needs from the config: engine, networks, loss, data."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from cmscale.config import Config, schedules
from cmscale.config.schedules import ScheduleValues
from cmscale.consistency.distance import Distance, build_distance
from cmscale.consistency.losses import Loss, build_loss
from cmscale.consistency.networks import Networks
from cmscale.data import Batch, Batches, open_batches, to_device
from cmscale.data.samples import Samples
from cmscale.distributed.collectives import from_main, on_main, together
from cmscale.distributed.world import World
from cmscale.engine.engine import Engine, NonFiniteLoss, StepResult
from cmscale.engine.flat_space import number_parameters
from cmscale.engine.settings import COMPUTE_DTYPES
from cmscale.errors import UserError
from cmscale.io.fetch import local_file
from cmscale.io.published import VGG16, published_file
from cmscale.model.attention_choice import Choice, choose, kernel_name, largest_attention
from cmscale.model.compiled import check_compiler, compile_blocks
from cmscale.model.denoiser import EDMDenoiser
from cmscale.model.precondition import denoiser_for, teacher_denoiser_for
from cmscale.model.trigflow import TrigFlow
from cmscale.model.unet import UNet, build_unet
from cmscale.model.weighting import build_weighted_unet
from cmscale.rng import SampleRandomness, sample_randomness
from cmscale.runs.manifests import Parameter, TrainState
from cmscale.source import load_first_weights, load_teacher, weights_fingerprint
from cmscale.training.measurements import Measurements


@dataclass(frozen=True)
class Parts:
    """What a training step needs: the engine, the method's loss, and the networks as denoisers."""

    config: Config
    world: World
    engine: Engine
    loss: Loss
    networks: Networks
    teacher_fingerprint: str | None
    measurements: Measurements
    attention: Choice

    def step(self, batch: Batch, values: ScheduleValues) -> StepResult:
        """One step on one global batch. It is not applied if the loss is not finite.

        If the step is logged, `measurements` then has what it measured.
        """
        self.measurements.begin(active=schedules.is_logged(self.config.train, values.step + 1))
        try:
            return self.engine.step(self.micro_losses(batch, values), values.learning_rate)
        except NonFiniteLoss:
            return StepResult(applied=False, loss=math.nan, grad_norm=math.inf, loss_scale=1.0)

    def micro_losses(self, batch: Batch, values: ScheduleValues) -> Iterator[Callable[[], torch.Tensor]]:
        """Yields a function per micro-batch that computes its mean loss."""
        images = to_device(batch, self.world.device)
        settings = self.config.train
        random = sample_randomness(
            settings.random_numbers, seed=settings.seed, positions=batch.positions, device=self.world.device
        )
        for clean, numbers in zip(
            images.split(settings.micro_batch_size), random.split(settings.micro_batch_size), strict=True
        ):
            yield partial(self._micro_loss, clean, values, numbers)

    def _micro_loss(self, clean: torch.Tensor, values: ScheduleValues, random: SampleRandomness) -> torch.Tensor:
        self.measurements.micro_batch(random)
        losses = self.loss(self.networks, clean, values, random)
        self.measurements.add("loss", losses)
        return losses.mean()


def assemble(config: Config, world: World, *, fresh: bool) -> Parts:
    """Builds networks, engine and loss of a method. Collective.

    Args:
        fresh: Whether training starts at step 0; then the student starts with the weights of `train.init_from` if that
            is set, else with the teacher's if the method's `teacher_choice` is not None.

    Raises:
        UserError: the network is class-conditional; such networks can be sampled and evaluated, but not trained.
    """
    method = config.method
    if config.model.num_classes is not None:
        raise UserError(
            f"model.num_classes: {config.model.num_classes}, but training data has no classes, so that only "
            "unconditional networks can be trained; leave it out"
        )
    attention = chosen_attention(config, world)
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": attention.kind})})
    facts, starts_from_teacher = method.facts, method.teacher_choice is not None
    needs_teacher = facts.follows_teacher or (starts_from_teacher and fresh)
    teacher = together(lambda: load_teacher(config)) if needs_teacher else None
    build_network = in_training(config, world, network_builder(config))
    start = None
    if fresh and (first := together(lambda: first_weights(config, teacher))) is not None:
        start = {**build_network().state_dict(), **first}  # they have none for the learned weighting
    engine = Engine(config, world, build_network, start, has_target=facts.has_target)
    networks = Networks(
        student=denoiser_for(method, engine.network),
        target=None if engine.target is None else denoiser_for(method, engine.target),
        teacher=build_teacher(config, engine, teacher, world=world)
        if facts.follows_teacher and teacher is not None
        else None,
    )
    measurements = Measurements()
    loss = build_loss(method, load_distance(config, world), measure=measurements.add)
    fingerprint = None if teacher is None else weights_fingerprint(teacher)
    return Parts(config, world, engine, loss, networks, fingerprint, measurements, attention)


def chosen_attention(config: Config, world: World) -> Choice:
    """The implementation of attention that rank 0 finds to be right and fast, for all ranks. Collective."""
    dtype = COMPUTE_DTYPES[config.engine.precision]

    def chosen() -> Choice:
        choice = choose(config.model, world.device, dtype)
        return replace(choice, kernel=kernel_name(choice, largest_attention(config.model), world.device, dtype))

    return from_main(on_main(chosen))


def first_weights(config: Config, teacher: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """The student's weights at step 0: those of `train.init_from`, else the teacher's; None if they are random."""
    return teacher if config.train.init_from is None else load_first_weights(config)


def network_builder(config: Config) -> Callable[[], UNet]:
    """Returns new networks as a run trains them, with their initial weights."""
    return partial(network_function(config), config.model, seed=config.train.seed)


def network_function(config: Config) -> Callable[..., UNet]:
    """The function that makes a run's network from the section `model`."""
    return build_weighted_unet if config.method.facts.learns_weighting else build_unet


def in_training(config: Config, world: World, build: Callable[[], UNet]) -> Callable[[], UNet]:
    """Returns new networks that compute as `model.compile` says. Elsewhere networks run without compiled code.

    Raises:
        UserError: nothing can be compiled here.
    """
    if config.model.compile == "off":
        return build
    check_compiler(world.device)

    def compiled() -> UNet:
        network = build()
        compile_blocks(network)
        return network

    return compiled


def flat_space(config: Config) -> tuple[Parameter, ...]:
    """The parameters of a run's network and their places in its checkpoints. Computes no weights."""
    with torch.device("meta"):
        return number_parameters(network_builder(config)())


def check_same_teacher(config: Config, first: str | None, current: str | None) -> str | None:
    """The fingerprint of the run's teacher, which must not change when the run is resumed.

    Args:
        first: Fingerprint in the checkpoint.
        current: Fingerprint of the weights that `method.teacher` holds now.

    Raises:
        UserError: the two differ, for example because the teacher's run was trained further.
    """
    if current is not None and first is not None and current != first:
        assert config.method.teacher_choice is not None
        raise UserError(
            f"method.teacher: the weights of {config.method.teacher_choice.source} have changed since this run started "
            f"(fingerprint {first[:12]}, now {current[:12]}); name the checkpoint that the run started with, or start "
            "a new run"
        )
    return first or current


def build_teacher(
    config: Config, engine: Engine, weights: dict[str, torch.Tensor], *, world: World
) -> EDMDenoiser | TrigFlow:
    """The frozen diffusion model that a distillation follows, as the loss evaluates it."""
    raw = engine.add_frozen("teacher", weights, in_training(config, world, partial(build_unet, config.model)))
    return teacher_denoiser_for(config.method, raw)


def load_distance(config: Config, world: World) -> Distance | None:
    """The distance of the loss. VGG16 for LPIPS is read from the config's file, or downloaded once per node."""
    settings = config.method.distance_settings
    weights = None
    if settings is not None and settings.name == "lpips":
        weights = together(lambda: vgg_file(settings.lpips_weights))
    return build_distance(config.method, config.model.image_size, lpips_weights=weights, device=world.device)


def vgg_file(place: str | None) -> Path:
    """VGG16's weights on this node: a given file, or torchvision's."""
    return published_file(VGG16) if place is None else local_file(place)


def open_data(config: Config, world: World, state: TrainState, samples: Samples) -> Batches:
    """Opens the batches that follow the training state."""
    return open_batches(
        config.data,
        world,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        image_size=config.model.image_size,
        start_cursor=state.cursor,
        samples=samples,
    )
