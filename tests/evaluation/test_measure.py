"""The pass over blocks gives every metric its samples in order, and leaves out what the inputs do not allow."""

from collections.abc import Iterator

import numpy as np
import pytest

from cmscale.errors import UserError
from cmscale.evaluation.blocks import blocks
from cmscale.evaluation.manifold import DENSITY_K, Manifold, compare
from cmscale.evaluation.measure import left_out, measure
from cmscale.evaluation.metrics.frechet import frechet_distance
from cmscale.evaluation.metrics.inception_score import adm_inception_score, inception_score
from cmscale.evaluation.metrics.kernel_distance import kernel_distance
from cmscale.evaluation.reference.reference import Reference
from cmscale.evaluation.statistics import Sums

WIDTHS = {"pooled": 12, "spatial": 7, "logits": 5}
Features = dict[str, np.ndarray]


def features_of(count: int, *, seed: int) -> Features:
    random = np.random.default_rng(seed)
    return {name: random.gamma(0.7, size=(count, width)).astype(np.float32) for name, width in WIDTHS.items()}


SAMPLES, REAL = features_of(300, seed=1), features_of(200, seed=2)


def in_blocks(features: Features, *names: str) -> Iterator[tuple[range, Features]]:
    count = len(features["pooled"])
    for block in blocks(count):
        yield block, {name: features[name][block.start : block.stop] for name in names or WIDTHS}


def reference_of(*, spatial: bool = True, subset: int | None = 200) -> Reference:
    return Reference(
        name="real",
        sha256="",
        features=None,
        count=200,
        pooled=Sums.of(REAL["pooled"]).moments(),
        spatial=Sums.of(REAL["spatial"]).moments() if spatial else None,
        subset=None if subset is None else REAL["pooled"][:subset],
    )


def test_every_metric_of_several_blocks_is_that_of_all_samples_in_order() -> None:
    found = measure(in_blocks(SAMPLES), num_samples=300, reference=reference_of())
    kid, kid_std = kernel_distance(SAMPLES["pooled"], REAL["pooled"])
    score, score_std = inception_score(SAMPLES["logits"])
    neighbours = compare(Manifold(SAMPLES["pooled"]), Manifold(REAL["pooled"]))
    whole = {name: Sums.of(SAMPLES[name]).moments() for name in ("pooled", "spatial")}
    real = reference_of()
    assert real.spatial is not None
    assert found == {
        "fid": pytest.approx(frechet_distance(whole["pooled"], real.pooled), rel=1e-10),  # sums of blocks, not of all
        "sfid": pytest.approx(frechet_distance(whole["spatial"], real.spatial), rel=1e-10),
        "inception_score": score,
        "inception_score_split_std": score_std,
        "inception_score_adm": adm_inception_score(SAMPLES["logits"]),
        "kid": kid,
        "kid_subset_std": kid_std,
        **{name: getattr(neighbours, name) for name in ("precision", "recall", "density", "coverage")},
    }
    assert left_out(found, reference=real) == []


NEIGHBOURS = {"precision", "recall", "density", "coverage"}


@pytest.mark.parametrize(
    ("count", "subset", "missing", "reason"),
    [
        (
            300,
            None,
            {"kid", *NEIGHBOURS},
            "no KID, precision, recall, density, coverage: the reference holds statistics",
        ),
        (300, DENSITY_K, NEIGHBOURS, f"no precision, recall, density, coverage: more than {DENSITY_K} samples and"),
        (DENSITY_K, 200, NEIGHBOURS, f"no precision, recall, density, coverage: more than {DENSITY_K} samples and"),
        (DENSITY_K + 1, DENSITY_K + 1, set(), None),
    ],
)
def test_metrics_of_neighbours_need_more_than_k_on_both_sides(
    count: int, subset: int | None, missing: set[str], reason: str | None
) -> None:
    samples = {name: values[:count] for name, values in SAMPLES.items()}
    reference = reference_of(subset=subset)
    found = measure(in_blocks(samples), num_samples=count, reference=reference)
    names = {"fid", "sfid", "inception_score", "kid", *NEIGHBOURS}
    assert names - set(found) == missing
    lines = left_out(found, reference=reference)
    assert [line[: len(reason or "")] for line in lines] == ([] if reason is None else [reason])


def test_a_network_without_classes_or_spatial_features_leaves_out_what_needs_them() -> None:
    found = measure(in_blocks(SAMPLES, "pooled"), num_samples=300, reference=reference_of())
    assert {"sfid", "inception_score", "inception_score_split_std"}.isdisjoint(found)
    assert left_out(found, reference=reference_of()) == [
        "no sFID: the reference or the feature network has no spatial features",
        "no IS (torch-fidelity), IS (ADM): the feature network predicts no classes",
    ]
    found = measure(in_blocks(SAMPLES), num_samples=300, reference=reference_of(spatial=False))
    assert "sfid" not in found
    assert "inception_score" in found


def test_features_that_are_not_finite_are_refused_with_their_samples() -> None:
    broken = {name: values.copy() for name, values in SAMPLES.items()}
    broken["pooled"][200, 3] = np.inf
    with pytest.raises(UserError, match="the features of samples 128 to 255 are not finite"):
        measure(in_blocks(broken), num_samples=300, reference=reference_of())


@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [0, 1]])
def test_a_missing_block_is_never_measured_as_if_it_were_there(kept: list[int]) -> None:
    some = [block for number, block in enumerate(in_blocks(SAMPLES)) if number in kept]
    with pytest.raises(AssertionError):
        measure(some, num_samples=300, reference=reference_of())
