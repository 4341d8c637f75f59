"""Defines the config section of the network, the ADM UNet."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cmscale.config.section import AsTuple, Count, Counts, Positive, Rate, Section, operational

NOISE_EMBEDDING_SCALE = 1000.0
"""`model.noise_embedding_scale` of OpenAI's networks, and of diffusers' pipeline for them."""


class Model(Section):
    """The ADM UNet (Dhariwal and Nichol 2021, appendix A).

    The time embedding gets `noise_embedding_scale` ln(sigma) / 4: 1000 in the code of Consistency Models, 1 in EDM's.
    `dropout_resolutions` are the image sizes in pixels at which residual blocks drop; null: all. `precision_layout`
    says which layers compute in bf16 or fp16: with `uniform` all; with `released`, as in the released code, not the
    time embedding, its layers in the residual blocks, normalisation and the output layer, which stay in float32.
    """

    image_size: Count
    channels: Count
    channel_multipliers: Counts
    num_res_blocks: Count
    attention_resolutions: Annotated[tuple[Count, ...], AsTuple] = ()
    head_channels: Count = 64
    dropout: Rate = 0.0
    dropout_resolutions: Annotated[tuple[Count, ...], AsTuple, Field(min_length=1)] | None = None
    resblock_updown: bool = True
    scale_shift_norm: bool = False
    num_classes: Count | None = None
    qkv_layout: Literal["three_heads_dim", "heads_three_dim"] = "three_heads_dim"
    noise_embedding_scale: Positive = NOISE_EMBEDDING_SCALE
    precision_layout: Literal["released", "uniform"] = "released"
    attention: Literal["auto", "xformers", "sdpa", "reference"] = operational("auto")
    activation_checkpointing: bool = operational(False)

    @model_validator(mode="after")
    def _divisible(self) -> "Model":
        levels = len(self.channel_multipliers)
        if levels == 0:
            raise ValueError("channel_multipliers: is empty; give one multiplier per level, for example [1,2,2]")
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size: {self.image_size} is not a multiple of {2 ** (levels - 1)}, "
                f"as the {levels} levels of channel_multipliers require; change one of the two"
            )
        sizes = [self.image_size >> level for level in range(levels)]
        for key in ("attention_resolutions", "dropout_resolutions"):
            for size in getattr(self, key) or ():
                if size not in sizes:
                    raise ValueError(f"{key}: no level has {size} px; choose from {sizes}")
        if self.channels % 32:
            raise ValueError(f"channels: {self.channels} is not a multiple of 32, the number of GroupNorm groups")
        last = len(sizes) - 1  # the middle block attends at the smallest level, even if no resolution is listed
        for level, multiplier in enumerate(self.channel_multipliers):
            width = multiplier * self.channels
            if (level == last or sizes[level] in self.attention_resolutions) and width % self.head_channels:
                raise ValueError(
                    f"head_channels: {self.head_channels} does not divide the {width} channels of level {level}; "
                    "choose a divisor"
                )
        return self
