"""Defines the config section of the network, the ADM UNet."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cmscale.config.section import AsTuple, Count, Counts, Positive, Rate, Section, key, operational

NOISE_EMBEDDING_SCALE = 1000.0
"""`model.noise_embedding_scale` of OpenAI's networks, and of diffusers' pipeline for them."""


class Model(Section):
    """The network: the ADM UNet (Dhariwal and Nichol 2021, appendix A)."""

    image_size: Count = key(
        ..., "Height and width of the images. The data set must hold images of this size.", unit="px"
    )
    channels: Count = key(..., "Channels of the first level; a multiple of 32. LSUN 256: 256.")
    channel_multipliers: Counts = key(
        ...,
        "One factor per level, from the full size down: a level has factor x `channels` channels, and each level after "
        "the first has half the size of the one before. LSUN 256: [1, 1, 2, 2, 4, 4].",
    )
    num_res_blocks: Count = key(..., "Residual blocks of each level on the way down; on the way up there is one more.")
    attention_resolutions: Annotated[tuple[Count, ...], AsTuple] = key(
        (),
        "Image sizes at which self-attention follows each residual block; the middle block always has it.",
        unit="px",
        source="none, as attention belongs to a data set's recipe; LSUN 256: [32, 16, 8]",
    )
    head_channels: Count = key(
        64, "Channels of each attention head; it must divide the channels of every level that attends.", source="ADM"
    )
    dropout: Rate = key(
        0.0,
        "Probability with which residual blocks drop a value during training. Student and target drop the same values.",
        source="Consistency Models for CD and CT; its teachers have 0.1, the configs of other methods their papers' "
        "rates",
    )
    dropout_resolutions: Annotated[tuple[Count, ...], AsTuple, Field(min_length=1)] | None = key(
        None,
        "Image sizes at which residual blocks drop; null: at all.",
        unit="px",
        source="ADM, whose dropout is uniform",
    )
    resblock_updown: bool = key(
        True, "Whether residual blocks halve and double the image; otherwise convolutions do.", source="ADM, LSUN 256"
    )
    scale_shift_norm: bool = key(
        False,
        "Whether the time embedding scales and shifts the normalised values; otherwise it is added before.",
        source="Consistency Models, LSUN 256",
    )
    num_classes: Count | None = key(
        None, "Number of classes of a class-conditional network; null: unconditional.", source="LSUN has no labels"
    )
    qkv_layout: Literal["three_heads_dim", "heads_three_dim"] = key(
        "three_heads_dim",
        "Order of the query, key and value channels in attention. It matters for weights of other projects.",
        source="the released weights of Consistency Models",
    )
    noise_embedding_scale: Positive = key(
        NOISE_EMBEDDING_SCALE,
        "The time embedding gets this factor x ln(sigma) / 4.",
        source="the code of Consistency Models; EDM's has 1",
    )
    precision_layout: Literal["released", "uniform"] = key(
        "released",
        "Which layers compute in bf16 or fp16: with `uniform` all; with `released` not the time embedding, its layers "
        "in the residual blocks, normalisation and the output layer, which stay in float32.",
        source="the released code of Consistency Models",
    )
    attention: Literal["auto", "xformers", "sdpa", "reference"] = operational(
        "auto",
        "Attention kernel. auto: on CUDA the faster of xformers and PyTorch's own (sdpa), if it agrees with the "
        "reference; else sdpa.",
    )
    activation_checkpointing: bool = operational(
        False,
        "Whether the backward pass computes blocks again rather than keep what they computed: less memory, slower.",
    )

    compile: Literal["off", "blocks"] = operational(
        "off",
        "Whether training computes residual and attention blocks with code that torch.compile makes for them, which "
        "takes minutes in the first step on a GPU. Samples and evaluations are computed without it. Refused with the "
        "forward-mode derivatives of sct and scd.",
    )

    memory_format: Literal["contiguous", "channels_last"] = operational(
        "contiguous",
        "Order of the activations in memory. With channels_last the tensor cores of a GPU need no transposes around "
        "convolutions in bf16 and fp16; parameters and checkpoints do not change.",
    )

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
        for name in ("attention_resolutions", "dropout_resolutions"):
            for size in getattr(self, name) or ():
                if size not in sizes:
                    raise ValueError(f"{name}: no level has {size} px; choose from {sizes}")
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

    def described(self) -> dict[str, Any]:
        """The values, as JSON, on which what the network computes depends beyond rounding."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        hows = {name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("operational")}
        return self.model_dump(mode="json", exclude=hows)
