"""Measures the memory of real training steps, and compares it with `cmscale estimate`.

    python ops/bench/memory.py [CONFIG [key=value ...]] [--ranks 1] [--device auto|cpu|cuda] [--cases NAME,...]
                               [--json FILE] [--against FILE]

Each case is a process of its own per rank: it builds the engine, makes seven steps, and reports the peak. On CUDA that
is the allocator's; on a CPU the peak of resident memory above what the process had before the networks were built,
with large blocks returned to the system at once. Without a config the cases are small networks over ZeRO stages,
precisions and activation checkpointing. The ratio to the estimate is wanted within 0.9 and 1.1.
"""

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from the checkout

import harness
import torch
from harness import Row

from cmscale.commands.use import USED
from cmscale.config import Config, dump_config, parse_config, read_config
from cmscale.distributed import world as worlds
from cmscale.distributed.compat import cpu_has_bf16
from cmscale.errors import UserError
from cmscale.training.estimate.memory import Assumed, Memory

ACTIVATIONS = """
method: {kind: ct, distance: l2}
model: {image_size: 64, channels: 64, channel_multipliers: [1, 1, 2], num_res_blocks: 1, attention_resolutions: [16],
        head_channels: 64}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-5}
train: {total_steps: 100, global_batch_size: 8, micro_batch_size: 8}
ema: {rates: [0.9999, 0.99994, 0.999943]}
engine: {zero_stage: 2, device: cpu}
"""
STATES = ["model.image_size=8", "model.channels=320", "model.channel_multipliers=[1,2]", "train.micro_batch_size=1"]
STATES += ["model.attention_resolutions=[]", "train.global_batch_size=4"]
CASES: dict[str, list[str]] = {
    "activations": [],
    "activations, checkpointing": ["model.activation_checkpointing=true"],
    "activations, bf16": ["engine.precision=bf16"],
    "states, ZeRO-0": [*STATES, "engine.zero_stage=0"],
    "states, ZeRO-1": [*STATES, "engine.zero_stage=1"],
    "states, ZeRO-2": STATES,
    "states, ZeRO-3": [*STATES, "engine.zero_stage=3"],
    "states, ZeRO-2, bf16": [*STATES, "engine.precision=bf16"],
    "states, ZeRO-2, bf16, joined": [*STATES, "engine.precision=bf16", "engine.parameters=joined"],
    "states, ZeRO-0, bf16": [*STATES, "engine.zero_stage=0", "engine.precision=bf16"],
}
STEPS = 7  # RAdam needs all its temporaries from the sixth step on


def main() -> int:
    parser = harness.parser(__doc__)
    harness.add_config(parser, default="small networks")
    parser.add("--ranks", use=USED, type=int, default=1)
    parser.add("--cases", use=USED, help="of the small networks, these alone: names with ; between them")
    parser.add("--measure", use=USED, nargs=2, metavar=("CONFIG", "OUT"), help=argparse.SUPPRESS)
    given = harness.parse(parser)
    if given.measure:
        return measure(Path(given.measure[0]), Path(given.measure[1]))
    rows, details = [], []
    load = os.getloadavg()[0]
    device = worlds.choose_device(given.device)
    for name, config in _cases(given, device).items():
        peaks = [_peak(config, ranks=given.ranks, device=device.type) for _ in range(given.rounds)]
        estimate = Memory(config, given.ranks, on_cuda=device.type == "cuda", assumed=Assumed(context=0, unused=0))
        size, checkpointing = config.train.micro_batch_size, config.model.activation_checkpointing
        terms = estimate.terms(size, activation_checkpointing=checkpointing)
        total = sum(term.size for term in terms) / 2**20
        rows.append(Row(f"{name}: measured", "MiB", peaks, baseline=f"{name}: estimated"))
        rows.append(Row(f"{name}: estimated", "MiB", [total] * given.rounds))
        terms = {term.name: round(term.size / 2**20, 1) for term in terms}
        details.append({"case": name, "terms_mib": terms, "ratio": round(total / rows[-2].median, 3)})
        print(f"{name}: estimated / measured {details[-1]['ratio']:.3f}  {terms}", file=sys.stderr)
    facts = {"ranks": given.ranks, "device": device.type, "cases": details}
    harness.report(given, rows, facts=facts, load=load)
    outside = [detail["case"] for detail in details if not 0.9 <= detail["ratio"] <= 1.1]
    print(
        f"within 10 %: {len(details) - len(outside)} of {len(details)}" + "".join(f"; not {name}" for name in outside)
    )
    return 1 if outside else 0


def _cases(given: argparse.Namespace, device: torch.device) -> dict[str, Config]:
    if given.config is not None:
        return {given.config.stem: read_config(given.config, given.overrides)}
    names = list(CASES) if given.cases is None else given.cases.split(";")
    if unknown := set(names) - CASES.keys():
        raise UserError(f"--cases {'; '.join(unknown)}: unknown; there are {'; '.join(CASES)}")
    if given.cases is None and device.type == "cpu" and not cpu_has_bf16():
        # torch emulates it there: with copies in fp32, and a step takes minutes
        left_out = [name for name in names if "engine.precision=bf16" in CASES[name]]
        print(f"left out, as this processor has no bf16: {'; '.join(left_out)}", file=sys.stderr)
        names = [name for name in names if name not in left_out]
    return {name: parse_config(ACTIVATIONS, [*CASES[name], *given.overrides]) for name in names}


def _peak(config: Config, *, ranks: int, device: str) -> float:
    """The largest peak of the ranks, MiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",  # larger blocks go back to the system when they are freed
                "MALLOC_TRIM_THRESHOLD_": "65536",
            }
            command = [sys.executable, __file__, "--device", device, "--measure", str(path), f"{folder}/{rank}.json"]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        try:
            while any(process.poll() is None for process in processes):
                if any(process.returncode for process in processes):
                    break  # the others may wait for this one
                time.sleep(0.1)
            failed = [rank for rank, process in enumerate(processes) if process.returncode]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            raise UserError(f"rank {failed[0]} failed; its message is above")
        return max(json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks))


def measure(path: Path, out: Path) -> int:
    """Makes steps on this rank and writes the peak, MiB."""
    from train_step import make_step, random_vgg, tiny

    torch.set_num_threads(1)
    # What the first engine imports is no part of a step.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    config = random_vgg(read_config(path), path.parent)
    world = worlds.detect(config.engine.device)
    worlds.connect(world)
    make_step(tiny(config, ranks=world.num_ranks), world)()  # loads what any step needs
    counter = _Allocator(world.device) if world.device.type == "cuda" else _Resident()
    step = make_step(config, world)
    counter.reset()
    for _ in range(STEPS):
        step()
    out.write_text(json.dumps(counter.peak()))
    worlds.disconnect()
    return 0


class _Allocator:
    """The peak of CUDA's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 2**20


class _Resident:
    """The peak of this process's resident memory above what it is when the counter is made."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size

    def peak(self) -> float:
        return self._read("VmHWM") - self.before

    def _read(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


if __name__ == "__main__":
    sys.exit(harness.run(main))
