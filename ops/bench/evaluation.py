"""Measures the speed of evaluation against torch-fidelity and the bare operations, interleaved in one run; medians.

    python ops/bench/evaluation.py [--full] [--rounds 3] [--device cpu|cuda] [--threads 1] [--json FILE]
                                   [--against FILE]

Sizes are small by default, and those of a real evaluation with --full (50,000 against 10,000 features of 2048). On a
CPU, seconds are CPU time of the process, so that other processes on the machine do not count.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import harness
import numpy as np
import torch
from harness import Row
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from cmscale.commands.use import USED
from cmscale.evaluation.features.extractor import CHUNK_SIZE, build_features
from cmscale.evaluation.features.inception import FIDInception
from cmscale.evaluation.manifold import Manifold, compare
from cmscale.evaluation.metrics.frechet import frechet_distance
from cmscale.evaluation.metrics.kernel_distance import kernel_distance
from cmscale.evaluation.statistics import Moments, Sums

WIDTH = 2048
Action = Callable[[], object]


def main() -> int:
    parser = harness.parser(__doc__, rounds=3)
    parser.add("--full", use=USED, action="store_true", help="the sizes of a real evaluation; minutes on a CPU")
    parser.add("--device", use=USED, choices=("cpu", "cuda"), default="cpu")
    parser.add("--threads", use=USED, type=int, default=1)
    parser.add("--memory", use=USED, nargs=2, type=int, metavar=("N", "M"), help=argparse.SUPPRESS)
    given = harness.parse(parser)
    with harness.threads(given.threads):
        if given.memory:
            print(_neighbours_peak(*given.memory))
            return 0
        load = os.getloadavg()[0]
        rows = [
            *_features(given, count=2000 if given.full and given.device == "cuda" else 20),
            *_neighbours(given, sizes=(50_000, 10_000) if given.full else (6000, 2000)),
            *_square_root(given, width=WIDTH if given.full else 512),
            *_kid(given, count=10_000 if given.full else 2000),
        ]
        return harness.report(given, rows, facts={"device": given.device, "full": given.full}, load=load)


def _rows(
    given: argparse.Namespace, what: str, actions: dict[str, Action], *, bare: str, wanted: float | None = None
) -> list[Row]:
    """Seconds of each action on one thing to compute; `ours` and the others against `bare`, in its share of speed."""
    clock = harness.clock_of(torch.device(given.device))
    timed = {f"{what}: {name}": harness.seconds(action, clock) for name, action in actions.items()}
    found = harness.interleaved(timed, rounds=given.rounds, warm_up=0)
    kind = "cpu" if given.device == "cpu" else "wall"
    rows = []
    for name in actions:
        full, is_ours = f"{what}: {name}", name == "ours"
        baseline = None if name == bare else f"{what}: {bare}"
        rows.append(Row(full, "s", found[full], baseline, wanted if is_ours else None, kind))
    return rows


def _features(given: argparse.Namespace, *, count: int) -> list[Row]:
    """Seconds: the extractor, its network alone on the same chunks, torch-fidelity's extractor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(_random_inception(), path)
        ours = build_features("inception", weights=path, device=given.device)
        with redirect_stdout(sys.stderr):
            theirs = FeatureExtractorInceptionV3(
                "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
            )
    theirs.to(given.device)
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)
    chunks = images.to(given.device).split(CHUNK_SIZE[given.device])

    def bare() -> None:
        with torch.inference_mode():
            for chunk in chunks:
                ours.network(chunk)

    def fidelity() -> None:
        with torch.inference_mode():
            for chunk in chunks:
                theirs(chunk)

    actions: dict[str, Action] = {"ours": lambda: ours(images), "bare": bare, "torch-fidelity": fidelity}
    return _rows(given, f"Inception features of {count} images of 256 px", actions, bare="bare", wanted=0.95)


def _neighbours(given: argparse.Namespace, *, sizes: tuple[int, int]) -> list[Row]:
    """Precision, recall, density and coverage, against the matrix products that they need at least."""
    n, m = sizes
    x, y = _some_features(n, seed=0), _some_features(m, seed=1)
    a, b = (torch.from_numpy(part).to(given.device) for part in (x, y))

    def ours() -> None:
        compare(Manifold(x, device=given.device), Manifold(y, device=given.device))

    def bare() -> None:
        for left, right in ((a, a), (b, b), (a, b)):
            for rows in left.split(max(1, (1 << 24) // len(right))):
                torch.mm(rows, right.T)

    actions: dict[str, Action] = {"ours": ours, "bare": bare}
    if not given.full:  # torch-fidelity keeps distances in float64: hours at full size
        actions["torch-fidelity"] = partial(
            prc_features_to_metric, a, b, prc_neighborhood=3, prc_batch_size=2000, save_cpu_ram=True, verbose=False
        )
    peak = subprocess.run(
        [sys.executable, __file__, "--memory", str(n), str(m)], capture_output=True, text=True, check=True
    )
    what = f"neighbours of {n} against {m} features"
    rows = _rows(given, what, actions, bare="bare", wanted=0.6)
    return [*rows, Row(f"{what}: peak memory", "MiB", [float(peak.stdout)], wanted=2048)]


def _neighbours_peak(n: int, m: int) -> int:
    """Peak memory of this process in MiB, including the features of both sides."""
    compare(Manifold(_some_features(n, seed=0)), Manifold(_some_features(m, seed=1)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _square_root(given: argparse.Namespace, *, width: int) -> list[Row]:
    """FID of three sets from their statistics: one square root per set, and one of the shared reference."""
    sets = [Sums.of(_some_features(4 * width, seed=seed, width=width)).moments() for seed in range(3)]
    reference = Sums.of(_some_features(4 * width, seed=9, width=width)).moments()

    def ours() -> None:
        fresh = Moments(reference.mean, reference.covariance)
        for each in sets:
            frechet_distance(Moments(each.mean, each.covariance), fresh)

    def fidelity() -> None:
        for each in sets:
            statistics_of = [{"mu": part.mean, "sigma": part.covariance} for part in (each, reference)]
            fid_statistics_to_metric(*statistics_of, verbose=False)

    actions: dict[str, Action] = {"ours": ours, "torch-fidelity": fidelity}
    return _rows(given, f"FID of 3 sets, {width} dimensions", actions, bare="torch-fidelity", wanted=1.0)


def _kid(given: argparse.Namespace, *, count: int) -> list[Row]:
    x, y = _some_features(count, seed=0), _some_features(count, seed=1)
    keywords = {"kid_subsets": 100, "kid_subset_size": 1000, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    keywords |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 2020, "verbose": False}
    doubles = [torch.from_numpy(part).double() for part in (x, y)]
    actions: dict[str, Action] = {
        "ours": lambda: kernel_distance(x, y),
        "torch-fidelity": lambda: kid_features_to_metric(*doubles, **keywords),  # pyright: ignore[reportArgumentType]
    }
    what = f"KID of {count} against {count} features, 100 subsets"
    return _rows(given, what, actions, bare="torch-fidelity", wanted=1.0)


def _some_features(count: int, *, seed: int, width: int = WIDTH) -> np.ndarray:
    """Non-negative float32 features, like pooled ones."""
    source = np.random.default_rng(seed)
    found = np.empty((count, width), dtype=np.float32)
    for at in range(0, count, 1000):
        part = found[at : at + 1000]
        np.maximum(source.standard_normal(part.shape, dtype=np.float32), 0, out=part)
    return found


def _random_inception() -> dict[str, torch.Tensor]:
    """Random weights that preserve the variance of activations."""
    with torch.device("meta"):
        network = FIDInception()
    network.to_empty(device="cpu")
    state = network.state_dict()
    for name, value in state.items():
        value.fill_(float(name.endswith(("bn.weight", "running_var"))))
        if value.dim() >= 2:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
    return state


if __name__ == "__main__":
    sys.exit(harness.run(main))
