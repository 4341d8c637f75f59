"""Tests of ops/adding_a_method.md: a method added by its steps trains, and a step left out is named in an error."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cmscale.config.methods.base import MethodFacts, MethodSection

pytestmark = pytest.mark.long

CHECKOUT = Path(__file__).resolve().parents[2]
GUIDE = CHECKOUT / "ops" / "adding_a_method.md"
_BLOCK = re.compile(r"<!-- (?P<what>new file|edit): (?P<path>\S+) -->\n```\w+\n(?P<text>.*?)```", re.DOTALL)

TRAIN = """
import json, sys, torch
from cmscale.config import parse_config, schedules
from cmscale.distributed.world import World, connect
from cmscale.rng import SampleRandomness
from cmscale.training.assemble import assemble

CONFIG = '''
method: {kind: toy, distance: DISTANCE, target_ema: 0.5}
model: {image_size: 8, channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, head_channels: 32}
data: {path: nowhere}
optimizer: {learning_rate: 1.0e-2}
train: {total_steps: 3, global_batch_size: 4, micro_batch_size: 4}
ema: {rates: [0.9]}
engine: {device: cpu, zero_stage: 0}
'''
world = World()
connect(world)

def trained(distance):
    config = parse_config(CONFIG.replace('DISTANCE', distance))
    parts = assemble(config, world, fresh=True)
    shards = parts.engine.shards
    start = shards.full("master")
    losses = []
    expected = start.clone()
    for step in range(3):
        values = schedules.at(config, step)
        clean = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1
        random = SampleRandomness(0, tuple(range(4 * step, 4 * step + 4)), world.device)
        loss = lambda: parts.loss(parts.networks, clean, values, random).mean()
        result = parts.engine.step([loss], values.learning_rate)
        shards.update(values)
        expected = 0.5 * expected + 0.5 * shards.full("master")
        losses.append(result.loss)
    target = shards.full("target")
    return {
        "losses": losses,
        "moved": float((shards.full("master") - start).abs().max()),
        "target": float((target - expected).abs().max()),
        "behind": float((target - shards.full("master")).abs().max()),
        "passes": config.method.forward_passes,
    }

print(json.dumps({distance: trained(distance) for distance in ("l1", "l2")}))
"""


@dataclass(frozen=True)
class Step:
    """One step of the guide: a new file, or replaced lines of an existing one."""

    path: str
    text: str
    is_new: bool

    def carry_out(self, root: Path) -> None:
        path = root / self.path
        if self.is_new:
            path.write_text(self.text)
            return
        source = path.read_text()
        for old, new in _hunks(self.text):
            assert source.count(old) == 1, f"{self.path}: the guide replaces lines that are not there:\n{old}"
            source = source.replace(old, new)
        path.write_text(source)


def _hunks(diff: str) -> list[tuple[str, str]]:
    found = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE)
    return [tuple(re.sub(r"^[-+]", "", part, flags=re.MULTILINE) for part in pair) for pair in found]


STEPS = {
    Path(block["path"]).parent.name + "/" + Path(block["path"]).name: Step(
        block["path"], block["text"], block["what"] == "new file"
    )
    for block in _BLOCK.finditer(GUIDE.read_text())
}


def checkout_with(folder: Path, steps: dict[str, Step]) -> Path:
    """A copy of the package with these steps carried out; what Python compiled comes along, which saves seconds."""
    shutil.copytree(CHECKOUT / "cmscale", folder / "cmscale")
    for step in steps.values():
        step.carry_out(folder)
    return folder


FORKS = """
import os, sys, traceback
import deepspeed, torch._dynamo  # what every training imports, once
program, *roots = sys.argv[1:]
for root in roots:
    if not os.fork():
        for number, name in ((1, "printed"), (2, "errors")):
            os.dup2(os.open(f"{root}/{name}", os.O_WRONLY | os.O_CREAT), number)
        os.chdir(root)
        sys.path.insert(0, root)
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[str, str]]:
    """What a training prints, and its errors, with the step left out that is the key, and with all steps (None)."""
    roots = {}
    for left_out in (None, *STEPS):
        folder = tmp_path_factory.mktemp("checkout")
        roots[left_out] = checkout_with(folder, {name: step for name, step in STEPS.items() if name != left_out})
    environment = {**os.environ, "MASTER_PORT": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", FORKS, TRAIN, *map(str, roots.values())], env=environment, check=True)
    return {key: ((root / "printed").read_text(), (root / "errors").read_text()) for key, root in roots.items()}


def test_the_guide_has_four_steps() -> None:
    assert sorted(STEPS) == ["losses/__init__.py", "losses/toy.py", "methods/__init__.py", "methods/toy.py"]


def test_a_method_added_as_the_guide_says_trains_with_its_target_and_its_distance(
    trained: dict[str | None, tuple[str, str]],
) -> None:
    printed, errors = trained[None]
    assert printed, errors
    found = json.loads(printed.splitlines()[-1])
    for each in found.values():
        assert each["moved"] > 0
        assert each["target"] <= 1e-7  # the average of the student with the config's rate
        assert each["behind"] > 0.1 * each["moved"]
        assert each["passes"] == 4
    assert found["l1"]["losses"][0] != found["l2"]["losses"][0]


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("methods/toy.py", "No module named 'cmscale.config.methods.toy'"),
        ("methods/__init__.py", "method.kind: got 'toy'"),
        ("losses/toy.py", "No module named 'cmscale.consistency.losses.toy'"),
        ("losses/__init__.py", "method Toy: no case in cmscale/consistency/losses/__init__.py"),
    ],
)
def test_a_step_left_out_is_an_error_that_names_it(
    trained: dict[str | None, tuple[str, str]], left_out: str, named: str
) -> None:
    printed, errors = trained[left_out]
    assert "losses" not in printed
    assert named in errors.splitlines()[-1]


def test_the_type_checker_sees_a_case_that_is_missing(tmp_path: Path) -> None:
    root = checkout_with(tmp_path, {name: step for name, step in STEPS.items() if name != "losses/__init__.py"})
    (root / "pyrightconfig.json").write_text(json.dumps({"include": ["cmscale/consistency/losses/__init__.py"]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    checked = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert 'Argument of type "Toy" cannot be assigned to parameter "method" of type "Never"' in checked.stdout


def _class_text() -> str:
    return STEPS["methods/toy.py"].text


@pytest.mark.parametrize("fact", sorted(MethodFacts.__dataclass_fields__))
def test_a_fact_left_out_is_named(fact: str) -> None:
    lines = [line for line in _class_text().splitlines() if not line.strip().startswith(f"{fact}=")]
    with pytest.raises(TypeError, match=f"'{fact}'"):
        exec("\n".join(lines), {"__name__": "toy"})


def test_facts_left_out_altogether_are_named() -> None:
    text = re.sub(r"    facts: ClassVar.*?\n    \)\n", "", _class_text(), flags=re.DOTALL)
    with pytest.raises(TypeError, match=r"method Toy: does not define facts; see ops/adding_a_method\.md"):
        exec(text, {"__name__": "toy"})


MIXINS = {
    "default_sampling_steps": "SampledInOneStep",
    "distance_settings": "ChosenDistance",
    "embeds_angle": "OnSigma",
    "needs_forward_mode": "WithoutForwardMode",
    "teacher_choice": "WithoutTeacher",
}


@pytest.mark.parametrize("member", sorted(MethodSection.__abstractmethods__))
def test_a_property_left_out_is_named(member: str) -> None:
    text = _class_text()
    if mixin := MIXINS.get(member):
        bases = re.search(r"class Toy\((.*)\):", text)
        assert bases is not None
        assert mixin in bases[1]
        text = text.replace(bases[1], ", ".join(base for base in bases[1].split(", ") if base != mixin))
    else:
        decorator = "" if member == "schedule" else "    @property\n"
        text = re.sub(rf"{decorator}    def {member}\(.*?(?=\n    @|\n    def |\Z)", "", text, count=1, flags=re.DOTALL)
    with pytest.raises(TypeError, match=f"method Toy: does not define {member}; see"):
        exec(text, {"__name__": "toy"})
