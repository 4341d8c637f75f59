"""Defines the raw network, the ADM UNet with OpenAI's parameter names, and initialises its weights."""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from cmscale.config import NOISE_EMBEDDING_SCALE, Model
from cmscale.errors import UserError
from cmscale.model import float32
from cmscale.model.blocks import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    Stage,
    Upsample,
    double,
    halve,
    timestep_embedding,
)
from cmscale.rng import DropoutKeys, generator


class UNet(nn.Module):
    """The ADM UNet (Dhariwal and Nichol 2021, appendix A) on images in [-1, 1].

    All parameters have one dtype: float32, float16 or bfloat16. Sinusoids and normalisation are computed in float32,
    and with the `released` precision layout the embedding layers and the output too (see `cmscale.model.float32`).
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        width = model.channels
        released = model.precision_layout == "released"
        self._linear = linear = float32.Linear if released else nn.Linear
        self.time_embed = nn.Sequential(linear(width, 4 * width), nn.SiLU(), linear(4 * width, 4 * width))
        if model.num_classes is not None:
            self.label_emb = nn.Embedding(model.num_classes, 4 * width)
        self._num_resblocks = 0
        channels = width * model.channel_multipliers[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(3, channels, 3, padding=1))])
        skips = [channels, *self._build_input(channels)]
        channels = skips[-1]
        size = self._size(len(model.channel_multipliers) - 1)
        self.middle_block = Stage(
            self._resblock(channels, channels, size),
            self._attention(channels),
            self._resblock(channels, channels, size),
        )
        self.output_blocks = nn.ModuleList()
        channels = self._build_output(channels, skips)
        last = float32.Conv2d if released else nn.Conv2d
        self.out = nn.Sequential(GroupNorm(channels), nn.SiLU(), last(channels, 3, 3, padding=1))

    def _resblock(
        self, in_channels: int, out_channels: int, size: int, resample: Callable[[Tensor], Tensor] | None = None
    ) -> ResBlock:
        """A residual block whose output is `size` px, the size at which it drops."""
        self._num_resblocks += 1
        sizes = self.model.dropout_resolutions
        return ResBlock(
            in_channels,
            out_channels,
            embedding_channels=4 * self.model.channels,
            layer=self._num_resblocks - 1,
            dropout=self.model.dropout if sizes is None or size in sizes else 0.0,
            scale_shift_norm=self.model.scale_shift_norm,
            activation_checkpointing=self.model.activation_checkpointing,
            linear=self._linear,
            resample=resample,
        )

    def _attention(self, channels: int) -> AttentionBlock:
        return AttentionBlock(
            channels,
            head_channels=self.model.head_channels,
            layout=self.model.qkv_layout,
            kind=self.model.attention,
            activation_checkpointing=self.model.activation_checkpointing,
        )

    def _size(self, level: int) -> int:
        return self.model.image_size >> level

    def _attends(self, level: int) -> bool:
        return self._size(level) in self.model.attention_resolutions

    def _build_input(self, channels: int) -> Iterator[int]:
        """Adds the levels from the full size down; yields the output channels of each stage."""
        last = len(self.model.channel_multipliers) - 1
        for level, multiplier in enumerate(self.model.channel_multipliers):
            for _ in range(self.model.num_res_blocks):
                stage: list[nn.Module] = [self._resblock(channels, multiplier * self.model.channels, self._size(level))]
                channels = multiplier * self.model.channels
                if self._attends(level):
                    stage.append(self._attention(channels))
                self.input_blocks.append(Stage(*stage))
                yield channels
            if level < last:
                if self.model.resblock_updown:
                    down = self._resblock(channels, channels, self._size(level + 1), halve)
                else:
                    down = Downsample(channels)
                self.input_blocks.append(Stage(down))
                yield channels

    def _build_output(self, channels: int, skips: list[int]) -> int:
        """Adds the levels from the smallest up; each stage consumes one of `skips`. Returns the output channels."""
        for level, multiplier in reversed(list(enumerate(self.model.channel_multipliers))):
            for block in range(self.model.num_res_blocks + 1):
                wide = multiplier * self.model.channels
                stage: list[nn.Module] = [self._resblock(channels + skips.pop(), wide, self._size(level))]
                channels = wide
                if self._attends(level):
                    stage.append(self._attention(channels))
                if level and block == self.model.num_res_blocks:
                    if self.model.resblock_updown:
                        up = self._resblock(channels, channels, self._size(level - 1), double)
                    else:
                        up = Upsample(channels)
                    stage.append(up)
                self.output_blocks.append(Stage(*stage))
        return channels

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, in which the network computes."""
        return self.time_embed[0].weight.dtype  # type: ignore[union-attr]

    @property
    def float32_parameters(self) -> tuple[str, ...]:
        """The parameters that the layout keeps in float32, whatever the network's dtype."""
        return float32.value_names(self) if self.model.precision_layout == "released" else ()

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        labels: Tensor | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Tensor:
        """The raw output F(x, c_noise), [B, 3, H, W] float32.

        Args:
            x: [B, 3, H, W], preconditioned.
            c_noise: [B], the input of the time embedding.
            labels: [B] class numbers; required if the model has classes, not allowed otherwise.
            dropout_keys: One key per sample, from which training mode draws its masks; None means no dropout.

        Raises:
            UserError: labels are missing, or given to an unconditional network.
        """
        dtype = self.dtype
        noise = c_noise * (self.model.noise_embedding_scale / NOISE_EMBEDDING_SCALE)  # exactly c_noise by default
        released = self.model.precision_layout == "released"
        sinusoids = timestep_embedding(noise, self.model.channels)
        embedding = self.time_embed(sinusoids if released else sinusoids.to(dtype))
        if self.model.num_classes is not None:
            if labels is None:
                raise UserError(
                    f"model.num_classes is {self.model.num_classes}: the network needs class labels; pass them"
                )
            embedding = embedding + self.label_emb(labels)
        elif labels is not None:
            raise UserError("labels were given, but model.num_classes is not set; leave them out")
        h = x.to(dtype)
        if self.model.memory_format == "channels_last":
            h = h.contiguous(memory_format=torch.channels_last)  # the layers keep it
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding, dropout_keys)
            skips.append(h)
        h = self.middle_block(h, embedding, dropout_keys)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, dropout_keys)
        return self.out(h.float() if released else h).float()


Built = TypeVar("Built", bound=UNet)


def build_unet(model: Model, *, seed: int = 0) -> UNet:
    """The network with initial weights, which depend only on the seed; the global generator is not used.

    It is built on the default device; under `with torch.device("meta")` it has shapes but no values.
    """
    return build_network(UNet, model, seed=seed)


def build_network(kind: type[Built], model: Model, *, seed: int) -> Built:
    """`build_unet` for a subclass of UNet."""
    device = torch.get_default_device()
    with torch.device("meta"):
        network = kind(model)
    if device.type != "meta":
        network.to_empty(device=device)
        initialise(network, seed=seed)
    return network


@torch.no_grad()
def initialise(network: UNet, *, seed: int) -> None:
    """Draws PyTorch's default distributions on the CPU, in the order of the modules; some layers are zero."""
    source = generator(seed, "weights")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in (module.weight, module.bias):
                parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=source))
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(torch.empty(module.weight.shape, device="cpu").normal_(generator=source))
        elif isinstance(module, GroupNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
    for layer in _zero_layers(network):
        layer.weight.zero_()
        assert layer.bias is not None
        layer.bias.zero_()


def _zero_layers(network: UNet) -> Iterator[nn.Conv2d]:
    """The layers initialised to zero: every block starts as its skip connection, and the output as zero."""
    for module in network.modules():
        match module:
            case ResBlock():
                yield module.out_layers[-1]  # type: ignore[misc]
            case AttentionBlock():
                yield module.proj_out
            case UNet():
                yield module.out[-1]  # type: ignore[misc]
