"""Tests of the engine on several gloo ranks."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks


def agreed(outputs: list[str]) -> dict:
    """The JSON that the ranks printed, which must be equal."""
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all(result == results[0] for result in results)
    return results[0]


def assert_near(found: dict, expected: dict, *, relative: float) -> None:
    for key, steps in found.items():
        for step, reference in zip(steps, expected[key], strict=True):
            assert step == pytest.approx(reference, rel=relative), key


def test_every_zero_stage_gives_the_same_losses_on_one_rank_and_on_two() -> None:
    two = agreed(run_ranks(2, "engine_work:losses", "fp32"))
    one = agreed(run_ranks(1, "engine_work:losses", "fp32"))
    for target in ("True", "False"):
        reference = {f"{stage} {target}": one[f"0 {target}"] for stage in range(4)}
        assert_near({key: one[key] for key in reference}, reference, relative=1e-5)
        assert_near({key: two[key] for key in reference}, reference, relative=1e-5)


def test_the_real_network_trains_alike_in_every_stage_with_and_without_recomputed_activations() -> None:
    found = agreed(run_ranks(2, "engine_work:unet_losses"))
    assert_near(found, dict.fromkeys(found, found["0 false"]), relative=1e-5)


@pytest.mark.long
def test_on_one_rank_the_engine_computes_what_a_plain_loop_of_torch_computes() -> None:
    found = agreed(run_ranks(1, "plain_work:compared"))
    names = ["master", "target", "ema_0.9999", "ema_0.99994", "ema_0.999943"]
    assert found == dict.fromkeys(["0 fp32", "2 fp32", "2 bf16"], dict.fromkeys(names, True))


@pytest.mark.long
def test_parameters_joined_into_one_tensor_train_to_the_same_bits() -> None:
    assert agreed(run_ranks(2, "plain_work:one_tensor")) == "ok"


@pytest.mark.slow
def test_compiled_blocks_train_alike_in_every_stage_are_compiled_once_and_runs_go_on_with_and_without() -> None:
    found = agreed(run_ranks(2, "engine_work:compiled_losses", timeout=550))
    losses = found["losses"]
    assert found["breaks"] == 0
    assert found["compiled"] > 0
    assert found["again"] == dict.fromkeys("0123", 0)  # by the steps after the first
    for end in ("", ", gone on"):
        plain = {key: losses[f"{key}{end}"] for key in ("0 false", "1 false", "2 true", "3 true")}
        assert_near({key: losses[f"{key} compiled{end}"] for key in plain}, plain, relative=1e-5)


def test_layers_that_compute_in_float32_have_the_masters_values_in_every_stage() -> None:
    assert agreed(run_ranks(2, "engine_work:float32_values")) == "ok"


def test_every_zero_stage_clips_alike() -> None:
    two = agreed(run_ranks(2, "engine_work:losses", "fp32", "engine.gradient_clip=0.05"))
    assert_near(
        {f"{s} True": two[f"{s} True"] for s in range(4)},
        dict.fromkeys((f"{s} True" for s in range(4)), two["0 True"]),
        relative=1e-5,
    )


@pytest.mark.parametrize(("precision", "rounding"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_low_precision_gives_the_same_losses_and_norms_in_every_stage_to_its_rounding(
    precision: str, rounding: float
) -> None:
    two = agreed(run_ranks(2, "engine_work:losses", precision, "engine.initial_loss_scale_power=8"))
    for target in ("True", "False"):
        reference = dict.fromkeys((f"{stage} {target}" for stage in range(4)), two[f"3 {target}"])
        assert_near({key: two[key] for key in reference}, reference, relative=rounding)


SMALL = 2**-9  # beside 1 it is less than half of bf16's last digit: a sum in bf16 loses it


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_averaged_over_ranks_in_fp32(stage: int) -> None:
    found = agreed(run_ranks(2, "engine_work:mean_gradients", "bf16", stage, [[1.0], [SMALL]]))
    assert found == pytest.approx([(1 + SMALL) / 2] * 2, rel=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_micro_batches_are_accumulated_in_fp32(stage: int) -> None:
    found = agreed(run_ranks(2, "engine_work:mean_gradients", "bf16", stage, [[1.0, SMALL, SMALL, SMALL], [0.0] * 4]))
    assert found == pytest.approx([(1 + 3 * SMALL) / 8] * 2, rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_rank_and_micro_batch_counts_alike_in_the_gradient(stage: int) -> None:
    found = agreed(run_ranks(2, "engine_work:mean_gradients", "fp32", stage, [[1.0, 2.0], [4.0, 9.0]]))
    assert found == pytest.approx([4.0, 4.0], rel=1e-6)


def test_no_bad_loss_or_gradient_reaches_the_weights_and_the_next_step_is_as_if_it_had_not_been() -> None:
    assert agreed(run_ranks(2, "engine_work:bad_steps")) == "ok"


@pytest.mark.long
def test_the_host_waits_for_nothing_until_the_last_backward_pass_has_begun() -> None:
    found = json.loads(run_ranks(2, "engine_work:waits")[0])
    assert {kind: before for kind, (before, _) in found.items()} == dict.fromkeys(found, 0)
    # then DeepSpeed reads whether all gradients are finite, and their norm, and the engine the losses
    assert max(found[kind][1] for kind in ("1 bf16", "2 bf16")) <= 7


def test_fp16_overflow_skips_the_step_and_lowers_the_scale() -> None:
    found = agreed(run_ranks(2, "engine_work:overflow"))
    for stage, results in found.items():
        applied = [was for was, _ in results]
        scales = [scale for _, scale in results]
        skipped = applied.index(True)
        assert skipped > 0, stage
        assert scales[: skipped + 1] == [2.0 ** (24 - index) for index in range(skipped + 1)]
        assert all(applied[skipped:])


def test_a_restored_run_ends_in_the_same_bits_and_any_world_and_stage_restores_them(tmp_path: Path) -> None:
    saved = agreed(run_ranks(2, "engine_work:save_in_every_stage", str(tmp_path)))
    one = agreed(run_ranks(1, "engine_work:restore_elsewhere", str(tmp_path)))
    four = agreed(run_ranks(4, "engine_work:restore_elsewhere", str(tmp_path)))
    for name, digests in saved.items():
        assert one[name] == digests
        assert four[name] == digests
        tolerance = 2**-8 if name.endswith("bf16") else 1e-5
        assert one[f"{name} loss"] == pytest.approx(four[f"{name} loss"], rel=tolerance)
