"""Reads the network in a pickle of NVlabs' EDM, of which nothing is executed.

Such a file holds a tree of objects as `torch_utils.persistence` stores them: the source code of their classes, which is
not looked at, the arguments of their constructors, and their state. Only the constructors' arguments and the tensors
are used. `DhariwalUNet` is the ADM UNet under other names. Its qkv channels have another order (heads, dim, three), and
its time embedding gets ln(sigma) / 4.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmscale.config import Model
from cmscale.errors import UserError
from cmscale.interop.files import located, readable
from cmscale.interop.names import Weights, attends, parameters
from cmscale.interop.strict import strict_weights
from cmscale.interop.torch_file import StoredTensor, TorchFile
from cmscale.io.pickles import Call, PickleError, plain, read_pickle
from cmscale.io.reading import reading

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_DEFAULTS: dict[str, Any] = {
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
}
"""What DhariwalUNet takes for arguments that its constructor was not given."""

_FEWEST_CHANNELS = 128  # below, its group norms have fewer groups than the 32 of the ADM UNet
_KNOWN_NETWORKS = {"SongUNet": "the DDPM++ or NCSN++ UNet"}


@dataclass(frozen=True)
class EDMNetwork:
    """The ADM UNet of a file, with EDM's preconditioning.

    Attributes:
        settings: What the file states of the network: keys of the config's model section, and their values.
        sigma_data: The constant of its preconditioning.
        weights: OpenAI's names, float32.
    """

    settings: dict[str, Any]
    sigma_data: float
    weights: Weights


def read_nvlabs(source: str | Path, model: Model) -> EDMNetwork:
    """Reads the network `ema` of a `.pkl` file (a path or `s3://`); it must be exactly that of `model`.

    Raises:
        UserError: there is no such file, it is damaged, its network is not the ADM UNet or not preconditioned as EDM
            does, or `model` is another network.
    """
    storage, key = located(source)
    origin = storage.join(key)
    with readable(storage, key) as path, reading(origin, "a pickle of NVlabs' EDM"):
        with path.open("rb") as file:
            content = plain(read_pickle(file, size=path.stat().st_size))
        outer = _persistent(content.get("ema", content.get("net")) if isinstance(content, dict) else content)
        return _read(outer, model, origin=origin)


@dataclass(frozen=True)
class _Object:
    """A persistent object: the name of its class, its constructor's arguments, its state."""

    kind: str
    arguments: dict[str, Any]
    state: dict[str, Any]


def _persistent(value: Any) -> _Object:
    if not isinstance(value, Call) or value.name != _PERSISTENT or len(value.arguments) != 1:
        named = value.name if isinstance(value, Call) else type(value).__name__
        raise PickleError(f"no network of torch_utils.persistence under 'ema', but {named[:100]}")
    meta = plain(value.arguments[0])
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise PickleError("its network states no class")
    state = plain(meta.get("state"))
    state = state if isinstance(state, dict) else {}
    arguments = plain(state.get("_init_kwargs"))
    return _Object(meta["class_name"], arguments if isinstance(arguments, dict) else {}, state)


def _children(state: Mapping[str, Any]) -> dict[str, Any]:
    found = plain(state.get("_modules"))
    return found if isinstance(found, dict) else {}


def _read(outer: _Object, model: Model, *, origin: str) -> EDMNetwork:
    inner = _children(outer.state).get("model")
    network = _persistent(inner) if isinstance(inner, Call) and inner.name == _PERSISTENT else None
    kind = network.kind if network else outer.kind
    if outer.kind == "Precond" and "unet" in _children(outer.state):
        raise UserError(f"{origin}: holds EDM2's UNet (Precond, UNet), whose layers the ADM UNet lacks; {_ADVICE}")
    if network is None or kind != "DhariwalUNet":
        described = f"{_KNOWN_NETWORKS[kind]} ({kind})" if kind in _KNOWN_NETWORKS else f"the architecture {kind[:100]}"
        raise UserError(f"{origin}: holds {described}; {_ADVICE}")
    if outer.kind != "EDMPrecond":
        raise UserError(f"{origin}: preconditions DhariwalUNet by {outer.kind[:100]}, not as EDM does; {_ADVICE}")
    settings = _settings({**_DEFAULTS, **network.arguments}, origin=origin)
    _check_settings(settings, model, origin=origin)
    weights = _weights(network, model, origin=origin)
    sigma_data = outer.state.get("sigma_data", 0.5)
    if not isinstance(sigma_data, float | int):
        raise PickleError("its sigma_data is no number")
    return EDMNetwork(settings, float(sigma_data), weights)


_ADVICE = "give a network of EDM's DhariwalUNet with EDMPrecond (--arch=adm --precond=edm)"


def _settings(arguments: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """The model section that the constructor's arguments describe."""
    whole = ("img_resolution", "in_channels", "out_channels", "label_dim", "model_channels", "channel_mult_emb")
    values = [arguments.get(name) for name in (*whole, "num_blocks")]
    for name in ("channel_mult", "attn_resolutions"):
        listed = arguments.get(name)
        values += listed if isinstance(listed, list | tuple) else [None]
    if not all(type(value) is int and 0 <= value < 2**20 for value in values):
        raise PickleError("its network's constructor has arguments that are no whole numbers")
    size, width, multipliers = arguments["img_resolution"], arguments["model_channels"], arguments["channel_mult"]
    if (arguments["in_channels"], arguments["out_channels"], arguments["channel_mult_emb"]) != (3, 3, 4):
        raise UserError(
            f"{origin}: its network has {arguments['in_channels']} input channels, {arguments['out_channels']} output "
            f"channels and channel_mult_emb {arguments['channel_mult_emb']}; only 3, 3 and 4 are supported"
        )
    narrowest = width * min(multipliers, default=0)
    if narrowest < _FEWEST_CHANNELS:
        raise UserError(
            f"{origin}: its group norms over {narrowest} channels have fewer than the ADM UNet's 32 groups; give a "
            f"network of at least {_FEWEST_CHANNELS} channels"
        )
    sizes = [size >> level for level in range(len(multipliers))]
    return {
        "image_size": size,
        "channels": width,
        "channel_multipliers": tuple(multipliers),
        "num_res_blocks": arguments["num_blocks"],
        "attention_resolutions": tuple(each for each in arguments["attn_resolutions"] if each in sizes),
        "head_channels": 64,
        "resblock_updown": True,
        "scale_shift_norm": True,
        "num_classes": arguments["label_dim"] or None,
        "noise_embedding_scale": 1.0,
    }


def _check_settings(settings: Mapping[str, Any], model: Model, *, origin: str) -> None:
    different = []
    for key, value in settings.items():
        ours = getattr(model, key)
        same = set(ours) == set(value) if key == "attention_resolutions" else ours == value
        if not same:
            shown = list(value) if isinstance(value, tuple) else "null" if value is None else value
            different.append(f"model.{key}={str(shown).replace(' ', '').lower()}")
    if different:
        raise UserError(f"{origin}: holds another network than the config's; set {' '.join(different)}")


def _weights(network: _Object, model: Model, *, origin: str) -> Weights:
    stored = dict(_tensors(network.state, prefix=""))
    found: dict[str, Any] = {}
    renamed = dict(_names(model))
    for parameter in parameters(model):
        theirs = renamed[parameter.name]
        tensor = stored.pop(theirs, None)
        if tensor is None:
            raise UserError(f"{origin}: its network lacks {theirs}, as {parameter.name} is called there")
        shape = parameter.shape[::-1] if theirs == _LABELS else parameter.shape
        if tensor.shape != shape:
            raise UserError(f"{origin}: {theirs} has the shape {list(tensor.shape)[:8]}, not {list(shape)}")
        values = tensor.load()
        if theirs == _LABELS:
            values = values.T
        if parameter.is_qkv:
            values = _reordered(values, model)
        found[parameter.name] = values
    for name, tensor in stored.items():
        if name.endswith(".resample_filter"):
            if tensor.shape != (1, 1, 2, 2) or not bool((tensor.load() == 0.25).all()):
                raise UserError(f"{origin}: {name} is another filter than the mean of 2 x 2 pixels; {_ADVICE}")
        elif name != _AUGMENT:
            raise UserError(f"{origin}: its network has {name[:100]}, which the ADM UNet lacks; {_ADVICE}")
    return strict_weights(found, {each.name: each.shape for each in parameters(model)}, origin=origin)


_LABELS = "map_label.weight"
_AUGMENT = "map_augment.weight"
"""Weights of the augmentation's parameters: sampling has none, and then EDM's code does not use them."""


def _tensors(state: Mapping[str, Any], *, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """Name and description of every parameter and buffer below an object."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [(prefix, state)]
    file = TorchFile(None, _no_file)
    seen = set()
    while waiting:
        prefix, state = waiting.pop()
        if id(state) in seen:
            raise PickleError("its modules contain each other")
        seen.add(id(state))
        for kind in ("_parameters", "_buffers"):
            members = plain(state.get(kind))
            for name, value in members.items() if isinstance(members, dict) else ():
                if value is None:
                    continue
                tensor = file.tensor(value)
                if tensor is None:
                    raise PickleError(f"{prefix}{name} is no tensor")
                yield f"{prefix}{name}", tensor
        for name, child in _children(state).items():
            if child is None:
                continue
            inner = _persistent(child).state if child.name == _PERSISTENT else plain(child.state)
            if not isinstance(inner, dict):
                raise PickleError(f"{prefix}{name} has no state")
            waiting.append((f"{prefix}{name}.", inner))


def _no_file(key: str, size: int) -> bytearray:
    raise PickleError(f"storage {key[:40]} of {size} bytes is not in the file")


def _reordered(values: Tensor, model: Model) -> Tensor:
    """Channels (heads, dim, three) in the model's order."""
    heads = values.reshape(-1, model.head_channels, 3, *values.shape[1:])
    order = (2, 0, 1) if model.qkv_layout == "three_heads_dim" else (0, 2, 1)
    return heads.permute(*order, *range(3, heads.ndim)).reshape(values.shape)


def _names(model: Model) -> Iterator[tuple[str, str]]:
    """OpenAI's name of every parameter, and DhariwalUNet's."""
    pairs = [
        ("time_embed.0", "map_layer0"),
        ("time_embed.2", "map_layer1"),
        ("out.0", "out_norm"),
        ("out.2", "out_conv"),
    ]
    pairs += [("input_blocks.0.0", f"enc.{_sized(model, 0)}_conv"), *_stages(model)]
    for ours, theirs in pairs:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"
    yield "label_emb.weight", _LABELS


def _stages(model: Model) -> Iterator[tuple[str, str]]:
    last = len(model.channel_multipliers) - 1
    stage = 1
    for level in range(last + 1):
        for block in range(model.num_res_blocks):
            yield from _block(f"input_blocks.{stage}", f"enc.{_sized(model, level)}_block{block}")
            stage += 1
        if level < last:
            yield from _block(f"input_blocks.{stage}", f"enc.{_sized(model, level + 1)}_down")
            stage += 1
    bottom = f"dec.{_sized(model, last)}"
    yield from _resblock("middle_block.0", f"{bottom}_in0")
    yield from _attention("middle_block.1", f"{bottom}_in0")
    yield from _resblock("middle_block.2", f"{bottom}_in1")
    stage = 0
    for level in range(last, -1, -1):
        for block in range(model.num_res_blocks + 1):
            here = f"output_blocks.{stage}"
            yield from _block(here, f"dec.{_sized(model, level)}_block{block}")
            if level and block == model.num_res_blocks:
                yield from _resblock(f"{here}.{1 + attends(model, level)}", f"dec.{_sized(model, level - 1)}_up")
            stage += 1


def _sized(model: Model, level: int) -> str:
    return f"{model.image_size >> level}x{model.image_size >> level}"


def _block(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """A residual block with the attention after it, where there is one."""
    yield from _resblock(f"{ours}.0", theirs)
    yield from _attention(f"{ours}.1", theirs)


def _resblock(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.in_layers.0", f"{theirs}.norm0"
    yield f"{ours}.in_layers.2", f"{theirs}.conv0"
    yield f"{ours}.emb_layers.1", f"{theirs}.affine"
    yield f"{ours}.out_layers.0", f"{theirs}.norm1"
    yield f"{ours}.out_layers.3", f"{theirs}.conv1"
    yield f"{ours}.skip_connection", f"{theirs}.skip"


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.norm", f"{theirs}.norm2"
    yield f"{ours}.qkv", f"{theirs}.qkv"
    yield f"{ours}.proj_out", f"{theirs}.proj"
