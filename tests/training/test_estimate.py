"""Tests that the estimate counts the networks, states and passes of real training, and what it makes of them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmscale.config import Config, Model, parse_config
from cmscale.model.unet import UNet, build_unet
from cmscale.training.estimate import counts
from cmscale.training.estimate.counts import LiveBytes, forward_flop, image_flop, num_parameters
from cmscale.training.estimate.duration import Rates, at_scale, best_interval, goodput, kept_checkpoints, sent_bytes
from cmscale.training.estimate.gpus import GPUS
from cmscale.training.estimate.memory import Memory
from cmscale.training.estimate.request import Request
from cmscale.training.estimate.tables import tables

CHECKOUT = Path(__file__).parents[2]
TEXT = """
method: METHOD
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, head_channels: 32}
data: {path: nowhere}
optimizer: {learning_rate: 1e-3}
train: {total_steps: 1000, global_batch_size: 8, micro_batch_size: 2}
ema: {rates: [0.9, 0.99]}
engine: {zero_stage: 2, precision: fp16}
"""
METHODS = {  # method: (networks, fp32 values per parameter in a checkpoint, forward passes per image)
    "{kind: edm}": (1, 5, 3),
    "{kind: cd, teacher: t, solver: heun, distance: l2}": (3, 6, 6),
    "{kind: ict}": (1, 5, 4),
    "{kind: sct}": (1, 5, 5),
    "{kind: scd, teacher: t}": (2, 5, 7),
    "{kind: pd, teacher: t, distance: l2}": (2, 6, 5),
}


def config_of(method: str = "{kind: ct, distance: l2}", *overrides: str) -> Config:
    return parse_config(TEXT.replace("METHOD", method), list(overrides))


def sizes(memory: Memory) -> dict[str, float]:
    return {term.name: term.size for term in memory.states}


@pytest.mark.parametrize("method", METHODS)
def test_networks_states_and_passes_are_the_methods(method: str) -> None:
    networks, states, passes = METHODS[method]
    config = config_of(method)
    count = num_parameters(config)
    terms = sizes(Memory(config, 2))
    assert terms["weights"] == networks * 2 * count
    assert terms["master weights"] + terms["optimizer moments"] + terms["averages"] == states * 4 * count / 2
    # jvp passes cost more than two forward passes; all else is what the method says of itself, to its first layer
    counted = image_flop(config) / forward_flop(config)
    if "sct}" not in method:
        assert counted == pytest.approx(passes, rel=0.05)
    assert config.method.forward_passes == passes


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "gradients", "masters", "moments"),
    [
        (0, "fp32", 4, 4, 0, 8),
        (0, "bf16", 2, 2, 4, 8),
        (1, "bf16", 2, 2, 2, 4),
        (2, "bf16", 2, 2, 2, 4),
        (3, "bf16", 1, 2, 2, 4),
        (2, "fp32", 4, 2, 2, 4),
    ],
)
def test_what_a_zero_stage_shares_is_divided_by_the_ranks(
    stage: int, precision: str, weights: int, gradients: int, masters: int, moments: int
) -> None:
    """Bytes per parameter on two ranks."""
    config = config_of("{kind: ict}", f"engine.zero_stage={stage}", f"engine.precision={precision}")
    count, terms = num_parameters(config), sizes(Memory(config, 2))
    assert terms["weights"] == weights * count
    assert terms["gradients"] == gradients * count
    assert terms["master weights"] == masters * count
    assert terms["optimizer moments"] == moments * count
    assert terms["averages"] == 2 * 4 * count / 2
    assert ("float32 layers" in terms) == (precision == "bf16")


def test_joined_parameters_take_the_layers_gradients_once_more() -> None:
    keys = ["engine.zero_stage=0", "engine.precision=fp32", "model.channels=128"]
    separate, joined = (config_of("{kind: ict}", f"engine.parameters={p}", *keys) for p in ("separate", "joined"))
    count = num_parameters(joined)
    sizes = [Memory(c, 1).activations(2, activation_checkpointing=False) for c in (separate, joined)]
    assert sizes[0] < 4 * count <= sizes[1] < 4 * count + sizes[0]


@pytest.mark.parametrize(
    ("millions", "ranks", "low", "sent"),
    [
        (60, 1, 2, 60 * 4),  # in the bucket, and in fp32
        (60, 8, 2, 60 * (2 + 4)),  # eight slices are put together before
        (526, 1, 2, 526 * 2 + 526 * 4),  # too large for a bucket: the gradient itself
        (526, 2, 2, 526 * 2 + 263 * 4),  # one slice after the other, of which each is more than a bucket
        (526, 8, 2, 526 * 2 + 131.5 * (2 + 4)),  # two slices together are
        (526, 512, 2, 526 * 2 + 98 * 526 / 512 * (2 + 4)),
        (526, 1, 4, 526 * 4),
        (526, 8, 4, 526 * 4 + 131.5 * 4),
    ],
)
def test_one_tensor_is_sent_in_slices_a_bucket_at_a_time(
    millions: int, ranks: int, low: int, sent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "num_parameters", lambda config: 1_000_000 * millions)
    precision = {2: "bf16", 4: "fp32"}[low]
    memory = Memory(config_of("{kind: ict}", "engine.parameters=joined", f"engine.precision={precision}"), ranks)
    assert memory._sent == pytest.approx(1e6 * sent, rel=1e-6)


@pytest.mark.parametrize(("precision", "part"), [("fp32", 1), ("bf16", 2)])
def test_joined_parameters_in_fp32_keep_whole_gradients_in_stage_2(precision: str, part: int) -> None:
    """DeepSpeed copies every tensor of which a rank updates a part, and that is the only one."""
    config = config_of("{kind: ict}", "engine.parameters=joined", f"engine.precision={precision}")
    assert sizes(Memory(config, 2))["gradients"] == 4 * num_parameters(config) / part


def test_joined_parameters_are_counted_anew_for_other_numbers_of_ranks() -> None:
    config = config_of("{kind: ict}", "engine.parameters=joined", "engine.precision=bf16", "model.channels=128")
    one = Memory(config, 1)
    few = one.activations(1, activation_checkpointing=False)
    assert one.at(8).activations(1, activation_checkpointing=False) > few


def test_live_bytes_are_those_of_tensors_that_are_reachable() -> None:
    known = torch.empty(1000, device="meta")
    with LiveBytes([known]) as live:
        first = known + 1
        assert (live.live, live.most) == (4000, 4000)
        view = first.view(10, 100).t()
        assert live.live == 4000
        second = first.double()
        assert live.live == 12000
        del first
        assert live.live == 12000  # its view lives
        del view
        assert live.live == 8000
        del second
        known.mul_(2)
        assert (live.live, live.most) == (0, 12000)


def test_saved_activations_of_a_chain_are_counted() -> None:
    """Of tanh(tanh(x)) both outputs are kept; backward has the gradients of two steps beside them, and two scalars."""
    x = torch.empty(1000, device="meta", requires_grad=True)
    with LiveBytes([x]) as live:
        out = x.tanh().tanh()
        assert live.live == 8000
        out.sum().backward()
    assert live.most == 4 * 4000 + 2 * 4


def test_checkpointing_keeps_less_and_computes_more() -> None:
    config = config_of("{kind: ict}", "model.num_res_blocks=2")
    peaks = {
        value: counts.micro_batch_peak(config, size=8, activation_checkpointing=value, reduce=counts.no_reduction)
        for value in (False, True)
    }
    assert peaks[True] < 0.6 * peaks[False]
    repeated = image_flop(config, activation_checkpointing=True) - image_flop(config)
    assert 0.5 < repeated / forward_flop(config) <= 1  # what follows a block's last saved tensor is not repeated


@pytest.mark.parametrize("method", ["{kind: ict}", "{kind: sct}"])
def test_norms_of_known_shapes_count_as_torch_computes_them(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(method, "model.num_res_blocks=2", "model.channel_multipliers=[1,2]")

    def counted() -> tuple[int, float]:
        peak = counts.micro_batch_peak(config, size=3, activation_checkpointing=True, reduce=counts.no_reduction)
        return peak, image_flop(config)

    found = counted()
    monkeypatch.setattr(counts, "_NORMS", ())
    assert found == counted()


def test_activations_grow_in_a_line_with_the_micro_batch() -> None:
    memory = Memory(config_of("{kind: ict}", "model.image_size=64"), 2)
    sixteen, eight, one = (memory.activations(n, activation_checkpointing=False) for n in (16, 8, 1))
    assert sixteen - eight == pytest.approx(8 * (eight - one) / 7)
    exact = counts.micro_batch_peak(memory.config, size=16, activation_checkpointing=False, reduce=counts.no_reduction)
    assert sixteen == pytest.approx(exact, rel=0.02)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    memory = Memory(config_of(), 2)
    capacity = memory.total(37, activation_checkpointing=False) + 1
    assert memory.largest_micro_batch(capacity, activation_checkpointing=False) == 37
    assert memory.largest_micro_batch(memory.assumed.context, activation_checkpointing=False) == 0
    assert memory.largest_micro_batch(capacity, activation_checkpointing=True) > 37


def test_many_ranks_share_and_count_a_micro_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    whole = counts.micro_batch_peak
    monkeypatch.setattr(counts, "micro_batch_peak", lambda *given, **more: counted.append(1) or whole(*given, **more))
    memory = Memory(config_of(), 2)
    totals = [memory.at(ranks).total(2, activation_checkpointing=False) for ranks in (1, 2, 4)]
    assert totals == sorted(totals, reverse=True)
    assert len(counted) == 2


def test_the_reduction_of_a_full_bucket_counts_where_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmscale.training.estimate.memory.LARGEST_BUCKET", 1000)
    config = config_of("{kind: ict}", "engine.precision=bf16")
    taken = []

    def peak(config: Config, *, reduce: counts.Reduce, **more: object) -> int:
        taken.extend([reduce(600), reduce(300), reduce(200), reduce(900), reduce(0)])
        return 0

    monkeypatch.setattr(counts, "micro_batch_peak", peak)
    Memory(config, 2).activations(1, activation_checkpointing=False)
    assert taken[:5] == [0, 0, 6 * 900, 6 * 200, 6 * 900]


def test_the_best_interval_is_where_the_goodput_is_greatest() -> None:
    for save, between in ((1.0, 3600.0), (30.0, 40000.0), (60.0, 600.0)):
        best = best_interval(save, between)
        shares = {"save": save, "restart": 100.0, "between": between}
        chosen = goodput(best, **shares)
        assert 0 < chosen < 1
        tried = [goodput(best * factor, **shares) for factor in (0.1, 0.5, 0.8, 1.25, 2, 10)]
        assert chosen > 0.9999 * max(tried)


def test_goodput_is_that_of_simulated_interruptions() -> None:
    save, restart, between, interval = 20.0, 60.0, 2000.0, 300.0
    generator = torch.Generator().manual_seed(0)
    gaps = iter(torch.empty(40000).exponential_(1 / between, generator=generator).tolist())
    time, done, left = 0.0, 0, next(gaps)
    while done < 20000:
        needed = interval + save
        while left < needed:  # interrupted: the segment is lost, and restarts until one is not interrupted
            time += left
            left = next(gaps)
            while left < restart:
                time += left
                left = next(gaps)
            time, left = time + restart, left - restart
        time, left, done = time + needed, left - needed, done + 1
    assert done * interval / time == pytest.approx(
        goodput(interval, save=save, restart=restart, between=between), rel=0.01
    )


def test_a_machine_that_never_stays_up_makes_no_progress() -> None:
    assert goodput(1e9, save=1.0, restart=1.0, between=1.0) == 0.0
    assert best_interval(100.0, 10.0) == 10.0


@pytest.mark.parametrize(
    ("steps", "every", "last", "multiples", "kept"),
    [(100, 10, 3, 0, 3), (100, 10, 3, 20, 6), (105, 10, 3, 0, 3), (105, 10, 1, 50, 3), (5, 10, 3, 0, 1)],
)
def test_kept_checkpoints_are_counted(steps: int, every: int, last: int, multiples: int, kept: int) -> None:
    keys = (f"train.total_steps={steps}", f"checkpoint.every_steps={every}", f"checkpoint.keep_last={last}")
    config = config_of("{kind: ict}", *keys, f"checkpoint.keep_every={multiples}")
    saved = sorted({*range(every, steps + 1, every), steps})
    listed = {step for step in saved if step in saved[-last:] or (multiples and step % multiples == 0)}
    assert kept_checkpoints(config) == len(listed) == kept


def test_stages_2_and_3_reduce_every_micro_batch() -> None:
    whole, part = 4 * 2 * 0.5 * 1000, 2 * 0.5 * 1000  # all-reduced gradients, gathered weights of 1,000 parameters
    sent = [
        sent_bytes(config_of("{kind: ict}", f"engine.zero_stage={stage}"), num_ranks=2, count=1000)
        for stage in range(4)
    ]
    assert sent == [whole, whole + part, 2 * whole + part, 2 * whole + 2 * part]


def test_a_batch_that_does_not_divide_is_left_out_of_the_scales() -> None:
    rates = Rates(tflops=1, network=1, interruption_hours=100, save_seconds=1, restart_seconds=1)
    assert at_scale(config_of(), rates, num_ranks=3, image_flop=1e9, count=1000) is None
    found = at_scale(config_of(), rates, num_ranks=4, image_flop=1e9, count=1000)
    assert found is not None
    assert found.seconds[0] == pytest.approx(8 * 1e9 / 4 / 1e12)
    assert found.days[0] == pytest.approx(1000 * found.seconds[0] / 86400)
    assert found.between == 100 * 3600 / 4


def test_the_tables_say_whether_it_fits_and_what_is_assumed() -> None:
    shown = {table.title: table for table in tables(config_of(), Request(gpus_per_node=4, gpu="l40s", price=2.0))}
    names = ["run", "memory_per_rank", "largest_micro_batch", "time_and_storage", "many_gpus"]
    assert [table.name for table in shown.values()] == names  # in JSON: whatever was asked
    memory = {row[0]: row for row in shown["memory per rank, ZeRO-2"].rows}
    assert memory["total"][2] == f"fits in the {GPUS['l40s'].gib} GiB of L40S 48 GB"
    assert "assumption" in memory["CUDA"][2]
    time = {row[0]: row for row in shown["time and storage on 4 GPUs"].rows}
    assert time["sustained"][2].startswith("an assumption: 35% of L40S")
    days = float(time["time"][1].split()[0])
    seconds = 8 * image_flop(config_of()) / (4 * 0.35 * 362e12)
    assert days == pytest.approx(1000 * seconds / 86400, rel=1e-2)
    assert [row[0] for row in shown["many GPUs"].rows] == ["8", "16", "32", "64", "128", "256", "512"]
    assert shown["many GPUs"].rows[0][2] == "the batch does not divide"
    assert all(len(row) == len(table.columns) for table in shown.values() for row in table.rows)


def test_a_network_is_made_once_to_count_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def build(model: Model) -> UNet:
        made.append(model)
        return build_unet(model)

    monkeypatch.setattr(counts, "network_function", lambda config: build)
    monkeypatch.setattr(counts, "micro_batch_peak", lambda config, **more: 1000 * more["size"])
    monkeypatch.setattr(counts, "image_flop", lambda config, **more: 1e9)
    assert list(tables(config_of(), Request(gpus_per_node=4, gpu="l40s")))
    assert len(made) == 1


def test_facts_are_the_numbers_of_the_tables() -> None:
    shown = {each.name: each for each in tables(config_of(), Request(nodes=1, gpus_per_node=4, gpu="l40s", price=2.0))}
    memory = shown["memory_per_rank"]
    rows = {row[0]: row[1] for row in memory.rows}
    assert {name: f"{gib:.2f}" for name, gib in memory.facts["gib"].items()}.items() <= rows.items()
    assert f"{memory.facts['total_gib']:.2f}" == rows["total"]
    assert math.isclose(sum(memory.facts["gib"].values()), memory.facts["total_gib"])
    assert memory.facts["fits"] is True
    time = shown["time_and_storage"].facts
    assert time["price"] == [2 * 4 * 24 * days for days in time["days"]]
    assert time["images_per_second"] == tuple(8 / seconds for seconds in reversed(time["step_seconds"]))
    for row, facts in zip(shown["many_gpus"].rows, shown["many_gpus"].facts, strict=True):
        assert row[0] == str(facts["gpus"])
        assert facts["batch_divides"] == (row[2] != "the batch does not divide")
        assert row[1] == (f"{facts['total_gib']:.2f}" if facts["batch_divides"] else "")
    for row in shown["largest_micro_batch"].rows:
        assert row[2] == str(shown["largest_micro_batch"].facts[row[0]]["without_checkpointing"])


def test_a_card_without_bf16_is_said_not_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "micro_batch_peak", lambda config, **more: 1000 * more["size"])
    monkeypatch.setattr(counts, "image_flop", lambda config, **more: 1e9)
    shown = [*tables(config_of("{kind: ict}", "engine.precision=bf16"), Request(gpus_per_node=4, gpu="v100-32g"))]
    assert "V100 32 GB has no bf16" in str(shown[1].rows)
    assert "v100-32g" not in str(shown[2].rows)


def test_the_lsun_network_has_the_papers_size() -> None:
    config = parse_config((CHECKOUT / "configs" / "lsun_bedroom_ct.yaml").read_text())
    assert num_parameters(config) == pytest.approx(526.3e6, rel=1e-4)
    lean = parse_config(
        (CHECKOUT / "configs" / "lsun_bedroom_cd_lpips.yaml").read_text(), ["ema.rates=[0.9999,0.99994,0.999943]"]
    )
    assert Memory(lean, 8).bytes_per_parameter <= 11
    partitioned = lean.model_copy(update={"engine": lean.engine.model_copy(update={"zero_stage": 3})})
    assert Memory(partitioned, 8).bytes_per_parameter <= 6


def test_counting_takes_no_memory_for_values() -> None:
    with torch.device("meta"):
        assert next(build_unet(config_of().model).parameters()).is_meta


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_real_steps_take_the_estimated_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "ops" / "bench" / "memory.py"), "--rounds", "1", "--device", "cpu"]
    done = subprocess.run([*command, "--json", str(tmp_path / "m.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    ratios = [case["ratio"] for case in json.loads((tmp_path / "m.json").read_text())["facts"]["cases"]]
    assert all(math.isclose(ratio, 1, abs_tol=0.1) for ratio in ratios)
