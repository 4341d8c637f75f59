"""Measures the speed of evaluation against torch-fidelity and the bare operations, interleaved in one run; medians.

    python ops/bench/evaluation.py [--json FILE] [--full] [--repeats 3] [--device cpu|cuda] [--threads 1]

Sizes are small by default, and those of a real evaluation with --full (50,000 against 10,000 features of 2048). On a
CPU, seconds are CPU time of the process, so that other processes on the machine do not count.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from cmscale.evaluation.features.extractor import CHUNK_SIZE, build_features
from cmscale.evaluation.features.inception import FIDInception
from cmscale.evaluation.manifold import Manifold, compare
from cmscale.evaluation.metrics.frechet import frechet_distance
from cmscale.evaluation.metrics.kernel_distance import kernel_distance
from cmscale.evaluation.statistics import Moments, Sums

WIDTH = 2048
Action = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--full", action="store_true", help="the sizes of a real evaluation; minutes on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs=2, type=int, metavar=("N", "M"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        print(_neighbours_peak(*given.memory))
        return 0
    clock = _clock(given.device)
    rows = [
        _features(given, clock, count=2000 if given.full and given.device == "cuda" else 20),
        _neighbours(given, clock, sizes=(50_000, 10_000) if given.full else (6000, 2000)),
        _square_root(given, clock, width=WIDTH if given.full else 512),
        _kid(given, clock, count=10_000 if given.full else 2000),
    ]
    result = {"device": _device_name(given.device), "threads": given.threads, "repeats": given.repeats, "rows": rows}
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    return 0


def _features(given: argparse.Namespace, clock: Callable[[], float], *, count: int) -> dict[str, Any]:
    """Images per second: the extractor, its network alone on the same chunks, torch-fidelity's extractor."""
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

    seconds = _timed(given, clock, {"ours": lambda: ours(images), "bare": bare, "torch-fidelity": fidelity})
    return {
        "what": f"Inception features of {count} images of 256 px",
        "seconds": seconds,
        "images_per_second": {name: round(count / value, 2) for name, value in seconds.items()},
        "share_of_bare": round(seconds["bare"] / seconds["ours"], 3),
        "wanted": 0.95,
    }


def _neighbours(given: argparse.Namespace, clock: Callable[[], float], *, sizes: tuple[int, int]) -> dict[str, Any]:
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
    seconds = _timed(given, clock, actions)
    peak = subprocess.run(
        [sys.executable, __file__, "--memory", str(n), str(m)], capture_output=True, text=True, check=True
    )
    return {
        "what": f"precision, recall, density, coverage of {n} against {m} features of {WIDTH}",
        "seconds": seconds,
        "share_of_bare": round(seconds["bare"] / seconds["ours"], 3),
        "wanted": 0.6,
        "peak_memory_mib": int(peak.stdout),
        "allowed_memory_mib": 2048,
    }


def _neighbours_peak(n: int, m: int) -> int:
    """Peak memory of this process in MiB, including the features of both sides."""
    compare(Manifold(_some_features(n, seed=0)), Manifold(_some_features(m, seed=1)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _square_root(given: argparse.Namespace, clock: Callable[[], float], *, width: int) -> dict[str, Any]:
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

    seconds = _timed(given, clock, {"ours": ours, "torch-fidelity": fidelity})
    return {"what": f"FID of 3 sets against one reference, {width} dimensions", "seconds": seconds}


def _kid(given: argparse.Namespace, clock: Callable[[], float], *, count: int) -> dict[str, Any]:
    x, y = _some_features(count, seed=0), _some_features(count, seed=1)
    keywords = {"kid_subsets": 100, "kid_subset_size": 1000, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    keywords |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 2020, "verbose": False}
    doubles = [torch.from_numpy(part).double() for part in (x, y)]
    seconds = _timed(
        given,
        clock,
        {
            "ours": lambda: kernel_distance(x, y),
            "torch-fidelity": lambda: kid_features_to_metric(*doubles, **keywords),  # pyright: ignore[reportArgumentType]
        },
    )
    return {"what": f"KID of {count} against {count} features of {WIDTH}, 100 subsets of 1000", "seconds": seconds}


def _timed(given: argparse.Namespace, clock: Callable[[], float], actions: dict[str, Action]) -> dict[str, float]:
    """Median seconds of each action; every round runs each of them once."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(given.repeats):
        for name, action in actions.items():
            began = clock()
            action()
            found[name].append(clock() - began)
            print(f"{name}: {found[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def _clock(device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


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
    sys.exit(main())
