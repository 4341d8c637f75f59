"""Tests of NVlabs' pickles as teachers: nothing is executed, and the mapped network computes what theirs computes."""

import pickle
from pathlib import Path

import pytest
import torch
from edm_pickles import Stored, adm_unet, denoised, layer, preconditioned, write_pickle
from networks import relative, small_config
from torch import nn

from cmscale.config import Config, Model
from cmscale.errors import UserError
from cmscale.interop import read_nvlabs, write_diffusers, write_openai
from cmscale.model import EDMDenoiser, build_unet
from cmscale.source import load_teacher

SIZES = {"size": 8, "width": 128, "multipliers": [1, 2], "blocks": 1, "attention": [8]}


def model(**changes: object) -> Model:
    settings = {
        "image_size": 8,
        "channels": 128,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "head_channels": 64,
        "scale_shift_norm": True,
        "noise_embedding_scale": 1.0,
    }
    return Model.model_validate({**settings, **changes})


@pytest.fixture(scope="module")
def plain_net() -> Stored:
    torch.manual_seed(0)
    return preconditioned(adm_unet(**SIZES, labels=0))


@pytest.fixture(scope="module")
def plain_file(plain_net: Stored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickle(tmp_path_factory.mktemp("edm") / "edm.pkl", plain_net, loss_fn=Stored("EDMLoss"), augment=None)


@pytest.mark.parametrize(("labels", "layout"), [(0, "three_heads_dim"), (5, "heads_three_dim")])
def test_the_mapped_network_computes_what_theirs_computes(tmp_path, labels: int, layout: str) -> None:
    torch.manual_seed(labels)
    net = preconditioned(adm_unet(**SIZES, labels=labels, augment=9), sigma_data=0.4)
    found = read_nvlabs(write_pickle(tmp_path / "edm.pkl", net), model(num_classes=labels or None, qkv_layout=layout))
    assert found.sigma_data == 0.4
    network = build_unet(model(num_classes=labels or None, qkv_layout=layout)).eval()
    network.load_state_dict(found.weights)
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.01, 1.0, 60.0])
    classes = torch.tensor([1, 4, 0]) if labels else None
    with torch.no_grad():
        ours = EDMDenoiser(network, sigma_data=0.4)(x, sigma, labels=classes)
        theirs = denoised(net, x, sigma, classes)
        raw = (ours - 0.16 / (sigma**2 + 0.16)[:, None, None, None] * x).double()
    assert relative(ours, theirs) < 1e-6
    assert raw.abs().max() > 0.01  # not the skip connection alone
    assert relative(raw, theirs - (0.16 / (sigma.double() ** 2 + 0.16))[:, None, None, None] * x.double()) < 1e-5


def config(teacher: Path, **changes: object) -> Config:
    return small_config(model(**changes), {"kind": "cd", "teacher": str(teacher)})


def test_such_a_file_teaches_a_student_of_the_same_network(plain_file) -> None:
    assert load_teacher(config(plain_file)).keys() == build_unet(model()).state_dict().keys()
    with pytest.raises(UserError, match=r"set model\.channels=128 model\.noise_embedding_scale=1\.0"):
        load_teacher(config(plain_file, channels=64, noise_embedding_scale=1000.0))


def test_another_sigma_data_is_refused(tmp_path, plain_net) -> None:
    other = preconditioned(plain_net.model, sigma_data=1.0)
    with pytest.raises(UserError, match=r"method\.teacher: .* method\.sigma_data 1, this config has 0\.5"):
        load_teacher(config(write_pickle(tmp_path / "edm.pkl", other)))


def unknown(kind: str, child: str | None = None) -> nn.Module:
    outer = Stored(kind)
    if child:
        setattr(outer, "unet" if kind == "Precond" else "model", layer(child, 2, 2))
    return outer


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (unknown("EDMPrecond", "SongUNet"), r"holds the DDPM\+\+ or NCSN\+\+ UNet \(SongUNet\); give a network of"),
        (unknown("Precond", "UNet"), "holds EDM2's UNet"),
        (unknown("Generator"), "holds the architecture Generator"),
        (nn.Linear(1, 1), "not a pickle of NVlabs' EDM .*'ema', but torch.nn.modules.linear.Linear"),
    ],
)
def test_other_architectures_are_named(tmp_path, network: nn.Module, line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_nvlabs(write_pickle(tmp_path / "x.pkl", network), model())


def test_another_preconditioning_and_other_parts_are_named(tmp_path, plain_net) -> None:
    net = plain_net.model
    with pytest.raises(UserError, match="preconditions DhariwalUNet by VPPrecond"):
        read_nvlabs(write_pickle(tmp_path / "x.pkl", preconditioned(net, kind="VPPrecond")), model())
    net.extra = layer("Linear", 2, 2)
    with pytest.raises(UserError, match=r"has extra\.weight, which the ADM UNet lacks"):
        read_nvlabs(write_pickle(tmp_path / "x.pkl", preconditioned(net)), model())
    del net.extra
    down = net.enc["4x4_down"].conv0
    down.resample_filter = torch.full((1, 1, 4, 4), 1 / 16)
    with pytest.raises(UserError, match=r"4x4_down\.conv0\.resample_filter is another filter"):
        read_nvlabs(write_pickle(tmp_path / "x.pkl", preconditioned(net)), model())
    down.resample_filter = torch.full((1, 1, 2, 2), 0.25)
    narrow = preconditioned(adm_unet(**{**SIZES, "width": 64}, labels=0))
    with pytest.raises(UserError, match="group norms over 64 channels have fewer than"):
        read_nvlabs(write_pickle(tmp_path / "x.pkl", narrow), model(channels=64))


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_nothing_in_such_a_file_is_executed(tmp_path, plain_net) -> None:
    path = write_pickle(tmp_path / "x.pkl", plain_net, dataset_kwargs=Malice(tmp_path / "was-here"))
    read_nvlabs(path, model())
    assert not (tmp_path / "was-here").exists()
    with pytest.raises((ImportError, AssertionError)):
        pickle.loads(path.read_bytes())


def test_a_cut_file_is_one_line(tmp_path, plain_file) -> None:
    content = plain_file.read_bytes()
    for length in (0, 1, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pkl").write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged, or not a pickle"):
            read_nvlabs(tmp_path / "cut.pkl", model())


def test_other_programs_formats_that_scale_the_time_otherwise_are_refused(tmp_path, plain_file) -> None:
    weights = read_nvlabs(plain_file, model()).weights
    with pytest.raises(UserError, match="scales the time embedding by 1000, this network by 1"):
        write_openai(tmp_path / "x.pt", weights, model=model())
    with pytest.raises(UserError, match="scales the time embedding by 1000, this network by 1"):
        write_diffusers(tmp_path / "x", weights, config=small_config(model()), step=1, weights_name="master")
    assert list(tmp_path.iterdir()) == []
