"""Runs the tests that need a GPU, and the benchmarks on the LSUN network, on a machine with one CUDA device.

`ops/gpu_check.sh` prepares what this needs and runs it. Each part is a process of its own with a share of the time; a
part that fails or takes too long is reported, and the others run. The results are one JSON and a table.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser
from cmscale.commands.use import USED

CHECKOUT = Path(__file__).resolve().parents[1]
CUDA = "pytest.mark.cuda"
PARTS = ("attention", "tests", "step", "compile", "memory", "sampling")
NARROW = ["model.image_size=16", "model.channels=32", "model.channel_multipliers=[1,2]", "model.head_channels=32"]
NARROW += ["model.num_res_blocks=1", "model.attention_resolutions=[8]"]
ATTENTION = """
import json, sys, torch
from cmscale.model.attention_choice import Shape, kernel_name, try_out
device, length, found = torch.device(sys.argv[1]), int(sys.argv[2]), {}
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    shape = Shape(length=length, heads=8, dim=64)
    choice = try_out(shape, device, dtype)
    found[str(dtype)] = {"kernel": kernel_name(choice, shape, device, dtype), "why": choice.why}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """A command of a part.

    Attributes:
        seconds: How long it may take.
        result: The JSON that it writes; None if its output counts.
    """

    part: str
    name: str
    command: list[str]
    seconds: float
    result: Path | None = None


def checks(out: Path, *, dry_run: bool, original: Path | None) -> Iterator[Check]:
    """All commands. With `dry_run` they run on the CPU, with a narrowed network."""
    device = "cpu" if dry_run else "cuda"
    python, bench, config = sys.executable, CHECKOUT / "ops" / "bench", CHECKOUT / "configs" / "lsun_bedroom_ct.yaml"
    narrow = [*NARROW, f"engine.precision={_precision_of_cpu()}"] if dry_run else ["engine.precision=bf16"]
    rounds = ["--rounds", "1" if dry_run else "3"]
    yield Check("attention", "attention", [python, "-c", ATTENTION, device, "64" if dry_run else "1024"], 60)
    # Those files alone: pytest imports all that it is given, and this machine may lack what other tests import.
    tests = [str(path) for path in sorted((CHECKOUT / "tests").rglob("test_*.py")) if CUDA in path.read_text()]
    marks = [] if dry_run else ["-m", "cuda"]
    yield Check("tests", "tests", [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *marks, *tests], 120)
    images = 2 if dry_run else 8  # LPIPS alone takes a CPU seconds
    whole = [f"train.global_batch_size={images}", f"train.micro_batch_size={images}", *narrow, "engine.zero_stage=2"]
    variants = {"step": [], "step, checkpointing": ["model.activation_checkpointing=true"]}
    for name, more in variants.items():
        result = out / f"{name.replace(', ', '-')}.json"
        command = [python, str(bench / "train_step.py"), str(config), *whole, *more]
        if original is not None and name == "step":
            command += ["method.distance=l2", "--original", str(original)]
        yield Check("step", name, [*command, "--device", device, *rounds, "--json", str(result)], 150, result)
    result = out / "memory.json"
    command = [python, str(bench / "memory.py"), str(config), *whole, f"engine.device={device}", "--device", device]
    yield Check("memory", "memory", [*command, "--rounds", "1", "--json", str(result)], 90, result)
    result = out / "sampling.json"
    command = [python, str(bench / "sampling.py"), str(config), *narrow, "--device", device, *rounds]
    yield Check("sampling", "sampling", [*command, "--json", str(result)], 90, result)
    # The step again, changed: beside the part `step` in one run they show what each change gives.
    changes = {"step, compiled": ["model.compile=blocks"]}
    changes["step, channels last"] = ["model.memory_format=channels_last"]
    changes["step, compiled, channels last"] = ["model.compile=blocks", "model.memory_format=channels_last"]
    changes["step, LPIPS in fp16"] = ["method.lpips_precision=fp16"]
    compiling = 900 if dry_run else 300
    for name, more in changes.items():
        result = out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        command = [python, str(bench / "train_step.py"), str(config), *whole, *more]
        yield Check("compile", name, [*command, "--device", device, *rounds, "--json", str(result)], compiling, result)


def _precision_of_cpu() -> str:
    """bf16 where this CPU has it: emulated, a step takes minutes."""
    from cmscale.distributed.compat import cpu_has_bf16

    return "bf16" if cpu_has_bf16() else "fp32"


def parts(text: str) -> list[str]:
    """The parts of a list with commas, for argparse."""
    named = text.split(",")
    if unknown := [name for name in named if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]!r}; parts are {', '.join(PARTS)}")
    return named


def main(arguments: list[str]) -> int:
    parser = CommandParser(prog="ops/gpu_check.sh", description=__doc__)
    parser.add("--only", use=USED, type=parts, metavar="A,B", help=f"these parts alone, of {', '.join(PARTS)}")
    parser.add("--out", use=USED, type=Path, default=Path("gpu_check"), help="folder of the results")
    parser.add("--dry-run", use=USED, action="store_true", help="on the CPU, with a narrowed network")
    original = "a checkout of the released code, for the step"
    parser.add("--original", use=USED, type=Path, metavar="DIR", help=original)
    parser.add("--minutes", use=USED, type=float, default=9.0, help="for everything together (default: 9)")
    given, _ = parser.read(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    document: dict[str, Any] = {"machine": machine(), "dry_run": given.dry_run, "checks": {}}
    for check in checks(out, dry_run=given.dry_run, original=given.original):
        if given.only and check.part not in given.only:
            continue
        patience = 10 if given.dry_run else 1  # a CPU is slower, and may have other work
        found = run(check, seconds=min(patience * check.seconds, deadline - time.monotonic()))
        document["checks"][check.name] = found
        print(f"== {check.name}: {found['status']}, {found['seconds']} s\n{found['output']}", flush=True)
        (out / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    print(f"results: {out / 'gpu_check.json'}")
    return 0 if all(found["status"] == "passed" for found in document["checks"].values()) else 1


def run(check: Check, *, seconds: float) -> dict[str, Any]:
    """Runs a check in its time."""
    began = time.monotonic()
    if check.result is not None:
        check.result.unlink(missing_ok=True)
    if seconds < 5:
        return {"status": "no time left", "seconds": 0, "output": ""}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])}
    # Into files: a pipe would end only with the last process that a killed check has started.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
        process = subprocess.Popen(check.command, cwd=CHECKOUT, env=environment, start_new_session=True, **streams)
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else f"failed (status {code})"
        except subprocess.TimeoutExpired:
            code, status = None, f"took more than {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks too, which would hold the device
            process.wait()
        output = _end(stdout, 6000) + ("" if code == 0 else _end(stderr, 3000))
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began, 1), "output": output}
    if check.result is not None and check.result.is_file():
        found["result"] = json.loads(check.result.read_text())
    return found


def _end(stream: IO[bytes], size: int) -> str:
    """The last characters of a file."""
    stream.seek(0)
    return stream.read().decode(errors="replace")[-size:]


def machine() -> dict[str, Any]:
    """What the results depend on."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1) if cuda else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def table(document: dict[str, Any]) -> str:
    """One line per check, and one per measured row."""
    lines = ["  ".join(f"{name} {value}" for name, value in document["machine"].items())]
    for name, found in document["checks"].items():
        lines.append(f"{name:40} {found['status']} in {found['seconds']} s")
        for row in found.get("result", {}).get("rows", []):
            ratio = "" if row["ratio"] is None else f"  {row['ratio']:.3f} of {row['baseline']}"
            lines.append(f"    {row['name']:44} {row['median']:12.5g} {row['unit']}{ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    leave(guarded(main))
