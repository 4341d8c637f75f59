"""Tests of the files in configs/: short, valid, with the numbers of the papers."""

from pathlib import Path

import pytest
import yaml

from cmscale.config import Config, Restart, Slurm, accumulation_steps, dump_config, parse_config, read_config
from cmscale.config.agreement import check_openai_teacher, check_teacher
from cmscale.errors import UserError
from launchers.command_line import describe_training
from launchers.placement import Placement

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((CHECKOUT / "configs").glob("*.yaml"))
LSUN = [path for path in CONFIGS if path.name.startswith("lsun_")]
SUCCESSORS = ("ict", "ect", "sct", "scd", "pd")
VARIANTS = ("ect_imagenet", "edm_angle", "tcm", "mcd")
PAPERS = [path for path in LSUN if not path.stem.endswith((*SUCCESSORS, *VARIANTS))]


SCM = {"p_mean": 0.04, "p_std": 1.92, "tangent_warmup_steps": 10000, "tangent_norm_c": 0.1}


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_every_promised_lsun_config_is_there():
    kinds = {"bedroom": ("edm", "cd_lpips", "cd_l2", "ct", *SUCCESSORS, *VARIANTS), "cat": ("edm", "cd_lpips", "ct")}
    assert set(names(LSUN)) == {f"lsun_{cat}_{kind}" for cat, of_cat in kinds.items() for kind in of_cat}


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_config_is_at_most_40_lines_and_survives_being_written_out(path: Path):
    assert len(path.read_text().splitlines()) <= 40
    config = read_config(path)
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("path", LSUN, ids=names(LSUN))
@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_lsun_config_divides_over_nodes_of_eight_gpus(path: Path, nodes: int):
    config = read_config(path)
    placement = Placement("slurm", nodes, 8, True, None, 60, Slurm(), Restart())
    assert accumulation_steps(config, num_ranks=placement.num_ranks) * placement.num_ranks * 4 == 2048
    assert "images" in describe_training(placement, config, root=Path("run"), code="")


@pytest.mark.parametrize("kind", SUCCESSORS)
def test_a_successors_config_has_its_papers_method_on_the_same_network(kind: str):
    config = read_config(CHECKOUT / "configs" / f"lsun_bedroom_{kind}.yaml")
    keys = config.method.model_dump()
    expected = {
        "ict": {"s0": 10, "s1": 1280, "p_mean": -1.1, "p_std": 2.0, "huber_c": None},
        "ect": {"p_mean": -1.1, "p_std": 2.0, "q": 2.0, "k": 8.0, "b": 1.0, "num_stages": 8, "huber_c": 0.0},
        "sct": {
            "p_mean": 0.04,
            "p_std": 1.92,
            "tangent_warmup_steps": 10000,
            "tangent_norm_c": 0.1,
            "start": "teacher",
        },
        "scd": {"p_mean": 0.04, "p_std": 1.92, "tangent_warmup_steps": 10000, "tangent_norm_c": 0.1},
        "pd": {"start_scales": 64, "weighting": "truncated_snr", "distance": "l2"},
    }[kind]
    assert {key: keys[key] for key in expected} == expected
    assert (keys["kind"], config.train.global_batch_size) == (kind, 2048)
    dropout = {"ict": 0.3, "ect": 0.2, "sct": 0.2, "scd": 0.0, "pd": 0.0}[kind]
    betas = (0.9, 0.99) if kind in ("sct", "scd") else (0.9, 0.999)
    assert (config.model.dropout, config.optimizer.betas) == (dropout, betas)
    assert (config.optimizer.kind, config.optimizer.learning_rate) == ("radam", 1e-5 if kind == "pd" else 1e-4)
    steps = {"ict": 400_000, "ect": 100_000, "sct": 400_000, "scd": 400_000, "pd": 9 * 50_000}[kind]
    rate = {"ict": 0.99993, "ect": 0.9999, "sct": 1 - 1 / (0.05 * steps), "scd": 1 - 1 / (0.05 * steps)}
    assert (config.train.total_steps, config.ema.rates[0]) == (steps, rate.get(kind, 0.999943))
    small = {"ict": (16, 8), "ect": (16, 8), "sct": (16, 8)}
    assert config.model.dropout_resolutions == small.get(kind)
    assert config.engine.precision == "fp16"
    assert network_of(config) == network_of(read_config(CHECKOUT / "configs" / "lsun_bedroom_ct.yaml"))


def network_of(config: Config) -> dict[str, object]:
    return {key: value for key, value in config.model.model_dump().items() if not key.startswith("dropout")}


def test_the_other_recipes_are_their_papers():
    ect, teacher, scd = (
        read_config(CHECKOUT / "configs" / f"lsun_bedroom_{name}.yaml") for name in ("ect_imagenet", "edm_angle", "scd")
    )
    expected = {"p_mean": -0.8, "p_std": 1.6, "weighting": "edm", "q": 4.0, "num_stages": 4, "huber_c": 0.06}
    keys = ect.method.model_dump()
    assert {key: keys[key] for key in expected} == expected
    assert (ect.model.dropout, ect.model.dropout_resolutions, ect.sampling.times) == (0.4, (16, 8), (80.0, 1.526))
    assert (ect.optimizer.kind, ect.optimizer.betas) == ("adam", (0.9, 0.99))
    assert (ect.optimizer.schedule, ect.optimizer.decay_reference) == ("inverse_square_root", 2000)
    assert network_of(ect) == network_of(scd) == network_of(teacher)
    assert teacher.method.time_embedding == scd.method.teacher_time_embedding == "angle"
    assert scd.method.teacher == "runs/lsun_bedroom_edm_angle"


def test_the_second_stage_of_truncated_training_follows_the_first():
    first, second = (
        read_config(CHECKOUT / "configs" / f"lsun_bedroom_{name}.yaml") for name in ("ect_imagenet", "tcm")
    )
    expected = {
        "sigma_min": 1.0,
        "p_std": 0.2,
        "degrees_of_freedom": 0.01,
        "boundary_share": 0.25,
        "boundary_weight": 0.1,
    }
    assert second.method.model_dump().items() >= (expected | {"weighting": "edm", "huber_c": 0.06}).items()
    assert second.method.gap == pytest.approx(first.method.q**-first.method.num_stages)
    assert second.method.teacher == "runs/lsun_bedroom_ect_imagenet"
    assert second.model == first.model
    check_teacher(first, second, origin="it")
    assert second.optimizer.learning_rate == first.optimizer.learning_rate / 2
    diffusion = read_config(CHECKOUT / "configs" / "lsun_bedroom_edm.yaml")
    with pytest.raises(UserError, match=r"it has method\.kind edm; give the first stage, a model of ect"):
        check_teacher(diffusion, second, origin="it")
    with pytest.raises(UserError, match="is another project's; give the first stage"):
        check_openai_teacher(read_config(CHECKOUT / "configs" / "lsun_bedroom_tcm.yaml", ["method.teacher=x.pt"]))


def test_multistep_distillation_has_its_papers_growing_steps_and_follows_the_same_teacher_as_cd():
    config, cd = (read_config(CHECKOUT / "configs" / f"lsun_bedroom_{name}.yaml") for name in ("mcd", "cd_l2"))
    expected = {"segments": 4, "teacher_steps": 64, "final_teacher_steps": 1280, "annealing_steps": 100_000}
    expected |= {"solver": "addim", "distance": "pseudo_huber", "huber_c": 1e-4}
    assert config.method.model_dump().items() >= (expected | {"weighting": "edm", "teacher": cd.method.teacher}).items()
    assert (config.model, config.optimizer) == (cd.model, cd.optimizer)
    check_teacher(read_config(CHECKOUT / "configs" / "lsun_bedroom_edm.yaml"), config, origin="it")


@pytest.mark.parametrize(
    ("name", "index", "last"),
    [("bedroom_cd_lpips", 17, 39), ("bedroom_cd_l2", 18, 39), ("bedroom_ct", 67, 150), ("cat_ct", 62, 150)],
)
def test_the_second_time_is_the_one_published_for_data_set_and_method(name: str, index: int, last: int):
    text = (CHECKOUT / "configs" / f"lsun_{name}.yaml").read_text()
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    expected = (high + index / last * (low - high)) ** 7
    assert parse_config(text).sampling.times == (80.0, pytest.approx(expected, rel=1e-8))
    assert ("--weights master" in text) == (name.startswith("bedroom_cd"))


@pytest.mark.parametrize("path", PAPERS, ids=names(PAPERS))
def test_lsun_config_has_the_papers_numbers(path: Path):
    config = read_config(path)
    method = config.method
    steps = {"cd": 600_000, "ct": 1_000_000, "edm": 600_000 if "bedroom" in path.name else 300_000}
    assert config.train.total_steps == steps[method.kind]
    assert config.train.global_batch_size == 2048
    assert config.optimizer.learning_rate == (1e-4 if method.kind == "edm" else 1e-5)
    assert (config.optimizer.kind, config.optimizer.weight_decay, config.optimizer.warmup_steps) == (
        "radam",
        0.0,
        0,
    )
    assert config.model.dropout == (0.1 if method.kind == "edm" else 0.0)
    assert (method.sigma_data, method.sigma_min, method.sigma_max, method.rho) == (0.5, 0.002, 80.0, 7.0)
    assert config.ema.rates[0] == 0.999943
    assert (config.engine.precision, config.data.flip) == ("fp16", True)
    if method.kind == "cd":
        assert (method.num_scales, method.solver, method.target_ema) == (40, "heun", 0.95)
        assert method.distance == ("l2" if path.stem.endswith("l2") else "lpips")
    if method.kind == "ct":
        assert (method.s0, method.s1, method.mu0, method.convention) == (2, 150, 0.95, "paper")
    model = config.model
    assert (model.image_size, model.channels, model.channel_multipliers) == (256, 256, (1, 1, 2, 2, 4, 4))
    assert (model.num_res_blocks, model.attention_resolutions, model.head_channels) == (2, (32, 16, 8), 64)
    assert (model.resblock_updown, model.scale_shift_norm, model.num_classes) == (True, False, None)


def _leaves_of(tree: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= _leaves_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_overrides_alone_make_every_config(path: Path):
    """One that did not reach its leaf would leave the default there."""
    config = read_config(path)
    leaves = _leaves_of(yaml.safe_load(dump_config(config)))
    written = {key: yaml.safe_dump(value, default_flow_style=True).splitlines()[0] for key, value in leaves.items()}
    assert parse_config("{}", [f"{key}={value}" for key, value in written.items()]) == config
