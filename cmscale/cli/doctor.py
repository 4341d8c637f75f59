"""Collects what a machine offers, for `cmscale doctor`."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator

PACKAGES = (
    "torch",
    "deepspeed",
    "xformers",
    "webdataset",
    "mosaicml-streaming",
    "boto3",
    "submitit",
    "wandb",
    "lpips",
    "torch-fidelity",
)


def findings() -> Iterator[tuple[str, str]]:
    """Yields (what was looked for, what was found)."""
    import torch

    from cmscale.model.attention_choice import Shape, kernel_name, try_out

    yield "python", sys.version.split()[0]
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "MISSING: pip install cmscale"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    yield "CUDA devices", f"{count} ({names})" if count else "none; engine.device=auto takes the CPU"
    yield "attention on cpu", "sdpa"
    if count:
        device, shape = torch.device("cuda"), Shape(length=1024, heads=8, dim=64)  # of the LSUN networks
        choice = try_out(shape, device, torch.float16)
        yield "attention on cuda", f"{kernel_name(choice, shape, device, torch.float16)}: {choice.why}"
    yield "processors", str(len(os.sched_getaffinity(0)))
    yield "Slurm", shutil.which("sbatch") or "no sbatch on the PATH; launchers run jobs on this machine"
    yield "S3 endpoint", os.environ.get("AWS_ENDPOINT_URL", "Amazon's (AWS_ENDPOINT_URL is not set)")
    yield "S3 credentials", _credentials()
    yield "wandb", "online (key found)" if os.environ.get("WANDB_API_KEY") else "offline unless `wandb login` was run"


def _credentials() -> str:
    from boto3.session import Session

    found = Session().get_credentials()
    return "none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if found is None else f"found ({found.method})"
