"""Plans the study: reads the recipes, composes the config of each run, and lists the commands in order."""

import copy
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmscale.config import parse_config
from cmscale.config.files import dump_yaml, read_yaml_text
from cmscale.config.yaml_text import parse_yaml
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably

RECIPES = Path(__file__).resolve().parent / "recipes"
CHECKOUT = Path(__file__).resolve().parents[2]
SETTINGS_FILE = "study.yaml"
SEEDS = 3
POINTS = 3
"""Checkpoints that are evaluated after the first: at each third of the training, where pd ends stages."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share; a study that goes on keeps it.

    Attributes:
        images: Images that each method sees, rounded up to whole thirds of the training.
        batch: Images of one step.
        pictures: Training pictures.
        samples: Samples of each evaluation.
        image_size: Side of the pictures, px.
    """

    images: int = 60000
    batch: int = 32
    pictures: int = 4000
    samples: int = 1000
    image_size: int = 32
    device: str = "cpu"

    @property
    def steps_per_point(self) -> int:
        return math.ceil(self.images / self.batch / POINTS)

    @property
    def steps(self) -> int:
        return POINTS * self.steps_per_point

    @property
    def points(self) -> tuple[int, ...]:
        """The steps whose checkpoints are evaluated."""
        return tuple(number * self.steps_per_point for number in range(POINTS + 1))


@dataclass(frozen=True)
class Recipe:
    """A method of the study.

    Attributes:
        after: The recipe whose run of the same seed is the teacher, or gives the first weights.
        config: What differs from `common.yaml`.
        share_of_steps: Keys of `method` that are a share of the training's steps.
        last_point: By number of sampling steps the point whose model they are meant for, where that is not the last.
        sampling_steps: In how many steps its samples are measured.
    """

    name: str
    after: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    share_of_steps: Mapping[str, float] = field(default_factory=dict)
    last_point: Mapping[int, int] = field(default_factory=dict)
    sampling_steps: Sequence[int] = (1, 2)


@dataclass(frozen=True)
class Command:
    """A command of the study, which is done once it has ended with status 0 and its product is there.

    Attributes:
        needs: Names of commands without which it can't begin.
        leftover: A folder that a killed start may have left without content; it is removed first.
    """

    name: str
    arguments: tuple[str, ...]
    product: Path
    needs: tuple[str, ...] = ()
    leftover: Path | None = None


def read_recipes(folder: Path = RECIPES) -> dict[str, Recipe]:
    """All recipes by name, each after the one that it starts from."""
    found: dict[str, Recipe] = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.stem != "common":
            content = parse_yaml(read_yaml_text(path, what="recipe"), origin=str(path))
            found[path.stem] = Recipe(path.stem, **content)
    return {name: found[name] for name in in_order(found, found)}


def in_order(recipes: Mapping[str, Recipe], names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """These recipes and those that they start from, which come first.

    Raises:
        UserError: there is no such recipe.
    """
    ordered: list[str] = []

    def add(name: str) -> None:
        if name not in recipes:
            raise UserError(f"--methods {name}: no such recipe; choose from {', '.join(sorted(recipes))}")
        after = recipes[name].after
        if after is not None:
            add(after)
        if name not in ordered:
            ordered.append(name)

    depth = {name: 0 if name not in recipes or recipes[name].after is None else 1 for name in names}
    for name in sorted(names, key=lambda name: (depth[name], name)):
        add(name)
    return ordered


@dataclass(frozen=True)
class Study:
    """The folder of a study, its settings and its recipes."""

    out: Path
    settings: Settings
    recipes: Mapping[str, Recipe]
    ranks: int = 1

    @property
    def micro_batch(self) -> int:
        return self.settings.batch // self.ranks

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def reference(self) -> Path:
        return self.out / "reference.npz"

    @property
    def held_out(self) -> Path:
        """The evaluation of pictures that no method saw: what perfect samples would get."""
        return self.out / "held_out.json"

    def run(self, recipe: str, seed: int) -> Path:
        return self.runs / f"{recipe}-{seed}"

    def config_text(self, recipe: Recipe, seed: int) -> str:
        """The whole config of a run. It is checked before anything begins."""
        settings = self.settings
        tree = parse_yaml(read_yaml_text(RECIPES / "common.yaml", what="recipe"), origin="common.yaml")
        for section, keys in copy.deepcopy(dict(recipe.config)).items():
            tree[section] = {**tree.get(section, {}), **keys}
        for key, share in recipe.share_of_steps.items():
            tree["method"][key] = round(share * settings.steps)
        if recipe.after is not None:
            tree["method"]["teacher"] = str(self.run(recipe.after, seed))
        tree["model"]["image_size"] = settings.image_size
        tree["data"]["path"] = str(self.data)
        tree["engine"]["device"] = settings.device
        tree["evaluate"] |= {"reference": str(self.reference), "num_samples": settings.samples}
        tree["ema"] = {"rates": [average_for(settings.steps)]}
        tree["checkpoint"] = {"every_steps": settings.steps_per_point, "keep_last": 100}  # a stop adds one of its own
        tree["train"] = {
            "total_steps": settings.steps,
            "global_batch_size": settings.batch,
            "micro_batch_size": self.micro_batch,
            "seed": seed,
            "log_every": max(settings.steps // 24, 1),
            "sample_every": settings.steps_per_point,
            "sample_count": 16,
        }
        text = dump_yaml(tree)
        parse_config(text, origin=f"recipe {recipe.name}")
        return text

    def write_config(self, recipe: Recipe, seed: int) -> Path:
        """Writes the config of a run.

        Raises:
            UserError: it was trained with another one.
        """
        path, text = self.out / "configs" / f"{recipe.name}-{seed}.yaml", self.config_text(recipe, seed)
        if path.exists() and self._without_ranks(path.read_text()) != self._without_ranks(text):
            raise UserError(f"{path}: recipe {recipe.name} was another one when this study began; give another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, text.encode())
        return path

    @staticmethod
    def _without_ranks(text: str) -> Any:
        tree = parse_yaml(text, origin="config")
        del tree["train"]["micro_batch_size"]
        return tree

    def commands(self, names: Sequence[str], seeds: int) -> Iterator[Command]:
        """All commands: the data first, then every method with the first seed, with the second, and so on."""
        pictures, device = self.out / "pictures", self.settings.device
        script = "ops/study/pictures.py"
        side = self.settings.image_size
        counts = [self.settings.pictures, self.settings.samples]
        yield Command("pictures", _script(script, pictures, *counts, side), pictures)
        prepare = ["--source", f"folder:{pictures / 'train'}", "--format", "mds", "--image-size", str(side)]
        prepare += ["--encoding", "png", "--workers", "1", "--out", str(self.data)]
        yield Command("data", _script("data_prep/prepare.py", *prepare), self.data, ("pictures",))
        measure = ["--features", "efficientnet", "--device", device]
        reference = [self.data, "--out", self.reference, *measure]
        yield Command("reference", _script("data_prep/reference.py", *reference), self.reference, ("data",))
        against = ["--reference", self.reference, "--out", self.held_out, *measure]
        held_out = ("-m", "cmscale", "evaluate", pictures / "held_out", *against)
        yield Command("held out", (sys.executable, *map(str, held_out)), self.held_out, ("reference",))
        for seed in range(seeds):
            for name in names:
                yield from self._of_run(self.recipes[name], seed)

    def _of_run(self, recipe: Recipe, seed: int) -> Iterator[Command]:
        """The training and the evaluations of one run."""
        run = self.run(recipe.name, seed)
        trained = f"train {run.name}"
        where = ["--cluster", "local", "--gpus-per-node", self.ranks, "--runs-dir", self.runs]
        is_there = (run / "config.yaml").exists()  # else a start was killed while it made the folder
        config = self.out / "configs" / f"{run.name}.yaml"
        size = f"train.micro_batch_size={self.micro_batch}"  # ranks may be others than before
        what = ["--resume", run.name, size] if is_there else ["--name", run.name, config]
        submit = _script("launchers/submit.py", *where, *what)
        needs = ("reference",) if recipe.after is None else ("reference", f"train {recipe.after}-{seed}")
        yield Command(trained, submit, run / "checkpoints", needs, leftover=None if is_there else run)
        points = ",".join(map(str, self.settings.points))
        steps = ",".join(map(str, recipe.sampling_steps))
        evaluate = _script("launchers/evaluate.py", *where, run, "--checkpoint", points, "--steps", steps)
        yield Command(f"evaluate {run.name}", evaluate, run / "evaluations", (trained,))
        if recipe.config["method"]["kind"] == "edm":
            own = _script("launchers/evaluate.py", *where, run, "--steps", recipe.config["method"]["sampler_steps"])
            yield Command(f"evaluate {run.name} by its own sampler", own, run / "evaluations", (trained,))


def _script(path: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(CHECKOUT / path), *map(str, arguments))


def average_for(steps: int) -> float:
    """The decay rate of an average over a tenth of the training."""
    return round(max(1 - 10 / steps, 0.0), 6)


@dataclass(frozen=True)
class Asked:
    """What a study is asked to run; `methods` and `seeds` are None for all. `is_there`: it has begun before."""

    settings: Settings
    methods: list[str] | None
    seeds: int | None
    is_there: bool

    def write(self, out: Path) -> None:
        """Writes it down for later starts."""
        out.mkdir(parents=True, exist_ok=True)
        content = {**asdict(self.settings), "methods": self.methods, "seeds": self.seeds}
        replace_durably(out / SETTINGS_FILE, dump_yaml(content).encode())


def read_asked(out: Path, given: Mapping[str, Any], choices: Mapping[str, Any]) -> Asked:
    """What a study is asked to run: values given, else those that it has, else the defaults.

    Args:
        given: Settings of the command line, by name; None where there is none.
        choices: Which methods and how many seeds, in the same way; these may change.

    Raises:
        UserError: the study in this folder has another setting.
    """
    path = out / SETTINGS_FILE
    is_there = path.exists()
    kept = parse_yaml(read_yaml_text(path, what="study"), origin=str(path)) if is_there else {}
    for name, value in given.items():
        if value is not None and name in kept and kept[name] != value:
            raise UserError(
                f"--{name} {value}: the study in {out} has {kept[name]}; leave it out, or give another --out"
            )
    values = {**asdict(Settings()), **kept, **{name: value for name, value in given.items() if value is not None}}
    chosen = {name: kept.get(name) if value is None else value for name, value in choices.items()}
    settings = Settings(**{name: values[name] for name in asdict(Settings())})
    return Asked(settings, chosen["methods"], chosen["seeds"], is_there)
