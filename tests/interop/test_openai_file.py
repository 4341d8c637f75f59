"""Tests of OpenAI's `.pt`: strict names and shapes, both qkv layouts, no code of the file is run."""

import os
import pickle
from collections import OrderedDict

import pytest
import torch
from networks import VARIANTS, random_weights, relative, small_config, small_model
from safetensors.torch import save_file

from cmscale.config import Model
from cmscale.errors import UserError
from cmscale.interop import parameter_shapes, read_openai, read_safetensors, write_openai, write_safetensors
from cmscale.interop.names import Layout, reorder_qkv
from cmscale.model import build_unet


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_names_and_shapes_are_those_of_the_network(variant):
    model = small_model(variant)
    with torch.device("meta"):
        network = build_unet(model)
    assert list(parameter_shapes(model).items()) == [(n, tuple(t.shape)) for n, t in network.state_dict().items()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, variant):
    model = small_model(variant)
    weights = random_weights(model)
    write_openai(tmp_path / "deep" / "x.pt", weights, model=model)
    assert equal(read_openai(tmp_path / "deep" / "x.pt", model), weights)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.pt"]
    build_unet(model).load_state_dict(torch.load(tmp_path / "deep" / "x.pt", weights_only=True))


def test_a_file_on_s3_is_written_and_read(s3):
    model = small_model()
    weights = random_weights(model)
    write_openai(f"{s3}/exports/x.pt", weights, model=model)
    assert equal(read_openai(f"{s3}/exports/x.pt", model), weights)
    with pytest.raises(UserError, match=r"exports/y\.pt: no such object"):
        read_openai(f"{s3}/exports/y.pt", model)


def test_half_precision_files_are_read_as_float32(tmp_path):
    model = small_model()
    halved = {name: tensor.half() for name, tensor in random_weights(model).items()}
    torch.save(halved, tmp_path / "x.pt")
    assert equal(read_openai(tmp_path / "x.pt", model), {name: tensor.float() for name, tensor in halved.items()})


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_that_a_wrapper_of_torchs_changed_are_taken(tmp_path, wrapper):
    model = small_model()
    weights = random_weights(model)
    torch.save({wrapper + name: tensor for name, tensor in weights.items()}, tmp_path / "x.pt")
    assert equal(read_openai(tmp_path / "x.pt", model), weights)
    save_file({wrapper + name: tensor for name, tensor in weights.items()}, tmp_path / "x.safetensors")
    assert equal(read_safetensors(tmp_path / "x.safetensors", model=model)[0], weights)


def test_parameters_that_were_saved_as_one_are_exported(tmp_path):
    config = small_config(small_model())
    weights = random_weights(config.model)
    torch.save({**weights, "time_embed.2.bias": weights["time_embed.0.bias"]}, tmp_path / "x.pt")
    found = read_openai(tmp_path / "x.pt", config.model)
    write_safetensors(tmp_path / "y.safetensors", found, config=config, step=0, weights_name="imported")
    assert equal(read_safetensors(tmp_path / "y.safetensors")[0], found)


def test_attention_saved_as_one_dimensional_convolutions_is_taken(tmp_path):
    model = small_model("older qkv")
    weights = random_weights(model)
    older = {
        name: tensor[..., 0] if name.endswith(("qkv.weight", "proj_out.weight")) else tensor
        for name, tensor in weights.items()
    }
    torch.save(older, tmp_path / "x.pt")
    assert equal(read_openai(tmp_path / "x.pt", model), weights)


def with_layout(weights: dict[str, torch.Tensor], *, model: Model, to: Layout) -> dict[str, torch.Tensor]:
    """The weights with the qkv channels in another layout than the model's."""

    def reordered(tensor: torch.Tensor) -> torch.Tensor:
        return reorder_qkv(tensor, head_channels=model.head_channels, source=model.qkv_layout, to=to)

    return {name: reordered(tensor) if ".qkv." in name else tensor for name, tensor in weights.items()}


def test_reordering_the_qkv_channels_changes_no_output_and_is_undone_by_the_reverse():
    model = small_model("older qkv")
    released = small_model("older qkv", qkv_layout="three_heads_dim")
    weights = random_weights(model)
    reordered = with_layout(weights, model=model, to="three_heads_dim")
    assert not torch.equal(reordered["middle_block.1.qkv.weight"], weights["middle_block.1.qkv.weight"])
    assert equal(with_layout(reordered, model=released, to="heads_three_dim"), weights)
    x, c_noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2)
    outputs = []
    for config, state in ((model, weights), (released, reordered)):
        network = build_unet(config).eval()
        network.load_state_dict(state)
        outputs.append(network(x, c_noise))
    assert relative(*outputs) < 1e-6


def test_missing_unexpected_and_misshapen_parameters_are_named_in_one_line(tmp_path):
    model = small_model()
    weights = random_weights(model)
    del weights["time_embed.0.weight"]
    weights["extra.weight"] = torch.zeros(1)
    weights["out.0.bias"] = torch.zeros(7)
    weights["out.0.weight"] = torch.zeros(32, dtype=torch.int64)
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        read_openai(tmp_path / "x.pt", model)
    line = str(caught.value)
    assert "\n" not in line
    assert "missing: time_embed.0.weight" in line
    assert "unexpected: extra.weight" in line
    assert "out.0.bias [7], not [32]" in line
    assert "out.0.weight (not a dense floating-point tensor)" in line


def test_a_wholly_different_network_is_refused_with_a_short_line(tmp_path):
    weights = random_weights(small_model("as ImageNet 64"))
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"unexpected: label_emb\.weight.* and \d+ more") as caught:
        read_openai(tmp_path / "x.pt", small_model())
    assert len(str(caught.value)) < 700


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, save):
    file, trace = tmp_path / "x.pt", tmp_path / "was-here"
    content = OrderedDict(random_weights(small_model()), extra=Malicious(str(trace)))
    if save == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content["extra"]))
    with pytest.raises(UserError, match=r"x\.pt: refused"):
        read_openai(file, small_model())
    assert not trace.exists()
    torch.load(file, weights_only=False) if save == "torch" else pickle.loads(file.read_bytes())
    assert trace.exists()  # an unsafe load does run the code


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: "):
        read_openai(tmp_path / "x.pt", small_model())


def test_a_cut_file_is_one_line(tmp_path):
    file, model = tmp_path / "x.pt", small_model()
    write_openai(file, random_weights(model), model=model)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"x\.pt: "):
        read_openai(file, model)


def test_anything_but_a_state_dict_is_one_line(tmp_path):
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds list; give a state dict of tensors"):
        read_openai(tmp_path / "x.pt", small_model())
    with pytest.raises(UserError, match="no such file"):
        read_openai(tmp_path / "none.pt", small_model())


def test_writing_the_weights_of_another_network_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="the weights to write"):
        write_openai(tmp_path / "x.pt", random_weights(small_model()), model=small_model("as ImageNet 64"))
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    model = small_model()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"not enough space for x\.pt"):
        write_openai(tmp_path / "x.pt", random_weights(model), model=model)
    assert list(tmp_path.iterdir()) == []
