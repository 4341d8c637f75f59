"""Defines what the commands that draw samples can be asked: `cmscale sample` and `launchers/sample.py`."""

import re
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from cmscale.commands import situation
from cmscale.commands.parser import Output
from cmscale.commands.use import USED, Use
from cmscale.config.methods.base import MOST_STEPS
from cmscale.config.models import Config
from cmscale.config.request_fields import option
from cmscale.config.sampling_times import check_steps, is_file, parse_step, parse_times
from cmscale.config.source_request import SourceRequest
from cmscale.errors import UserError
from cmscale.io.place import Place

Format = Literal["npz", "png", "tar"]


class DrawRequest(SourceRequest):
    """Which samples to draw, and where to."""

    out: Place = option(
        ...,
        "FILE.npz with arr_0, uint8 NHWC, as the ADM evaluator reads it; any other name is a folder of PNG files.",
        use=USED,
        metavar="PLACE",
    )
    format: Format | None = option(
        None, "npz: one array; png: a file per sample; tar: PNG files in tars of 512. Default: by --out.", use=USED
    )
    samples: int = option(64, "Number of samples.", use=USED, metavar="N", ge=1)
    steps: int | None = option(
        None,
        "Sampling steps. Default: 1; EDM: the config's.",
        use=Use(excludes=("times",)),
        metavar="N",
        ge=1,
        le=MOST_STEPS,
    )
    times: Place | None = option(
        None,
        "Descending noise levels (sigma) to sample at, or the JSON of search-times.",
        use=USED,
        metavar="80,4.4|FILE.json",
        flag="sampling_times",
    )
    seed: int = option(0, "Seed of the noise.", use=Use(randomness=(situation.DRAWN,)), metavar="N", ge=0)
    seeds: int = option(
        1,
        "Independent sets of samples, of this seed and the next ones, each in a place of its own (x-seed0.npz).",
        use=Use(randomness=(situation.DRAWN,)),
        metavar="N",
        ge=1,
        le=10_000,
    )
    grid: Place | None = option(
        None,
        "Also write a PNG grid of the samples (of the first 256).",
        use=USED,
        metavar="FILE.png",
        output=Output((".png",)),
    )
    noise: Place | None = option(
        None, "`.npy` of unit-variance start noise, float32 NCHW.", use=USED, metavar="FILE.npy"
    )
    sampler: Literal["heun", "euler", "dpm2", "ancestral"] = option(
        "heun", "EDM models only.", use=Use(model=(situation.DIFFUSION_MODEL,))
    )
    raw: bool = option(
        False, "Write float32 NCHW without clipping, to .npz.", use=Use(format=(situation.AS_NPZ,)), negatable=True
    )
    clip: bool = option(
        True,
        "Clamp every estimate to [-1, 1], as the released code does.",
        use=Use(written=(situation.AS_UINT8,)),
        negatable=True,
    )
    classes: str | None = option(
        None,
        "Conditional models: 1,2 (in turn), or `random`.",
        use=Use(classes=(situation.CONDITIONAL,)),
        metavar="1,2|random",
    )
    batch_size: int = option(64, "Samples drawn at once; changes pixels by rounding.", use=USED, metavar="N", ge=1)
    weights: str | None = option(
        None,
        "An EMA's name, or `master`. Default: the config's first EMA.",
        use=Use(source=situation.WITH_WEIGHTS_TO_CHOOSE),
        metavar="NAME",
    )
    step: str = option(
        "latest",
        "Step of a run's checkpoint, or `latest`.",
        use=Use(source=(situation.RUN,)),
        metavar="STEP",
        flag="checkpoint",
    )

    @field_validator("times")
    @classmethod
    def _descending(cls, text: Place | None) -> Place | None:
        if text is not None and not is_file(text):
            parse_times(text)
        return text

    @field_validator("step")
    @classmethod
    def _one_step(cls, text: str) -> str:
        parse_step(text)
        return text

    @field_validator("classes")
    @classmethod
    def _numbers(cls, text: str | None) -> str | None:
        parse_classes(text)
        return text

    @property
    def classes_asked(self) -> tuple[int, ...] | Literal["random"] | None:
        """The classes that samples have in turn; None if none are named."""
        return parse_classes(self.classes)

    def format_asked(self) -> Format:
        """The format of the set: the one that is named, else by the name of its place.

        Raises:
            UserError: the two contradict each other.
        """
        return format_of(self.out, self.format, option="--out")

    def situation(self, config: Config, *, num_times: int) -> dict[str, str]:
        """What the request and the model decide about the use of options: see `cmscale.commands.use`.

        Args:
            num_times: Number of times above zero at which samples are drawn.
        """
        family = config.method.facts.sampler
        between_steps = family == "multistep" and num_times > 1
        ancestral = family == "ode" and self.sampler == "ancestral" and num_times > 1
        draws = self.noise is None or self.classes == "random" or between_steps or ancestral
        return {
            "model": situation.MODEL_OF_SAMPLER[family],
            "classes": situation.UNCONDITIONAL if config.model.num_classes is None else situation.CONDITIONAL,
            "randomness": situation.DRAWN if draws else situation.ALL_GIVEN,
        }

    def check_fits(self, config: Config) -> None:
        """Checks that a model has the classes that are asked for, and times for that many steps.

        Raises:
            UserError: it has not, or needs classes and none are given.
        """
        check_classes(self.classes_asked, config, origin=self.source)
        own = config.sampling.times
        if self.steps is not None and (own is None or len(own) != self.steps):
            check_steps(config.method, self.steps)


def format_of(place: Place, named: Format | None, *, option: str) -> Format:
    """The format of a set of samples: the one that is named, else by the name of its place.

    Args:
        option: What names the place.

    Raises:
        UserError: the two contradict each other.
    """
    is_file_of_arrays = place.lower().endswith(".npz")
    if named is None and not is_file_of_arrays and _is_of_unknown_format(place):
        raise UserError(
            f"{option} {place}: the file's name must end in .npz, or name a folder for PNG files; a folder of this "
            f"name is {place.rpartition('/')[2]}/"
        )
    if named is not None and is_file_of_arrays != (named == "npz"):
        raise UserError(
            f"--format {named}: {option} {place} is {'a file' if is_file_of_arrays else 'a folder'}; "
            f"{'name a folder' if is_file_of_arrays else 'name a file that ends in .npz'}, or leave --format out"
        )
    return named or ("npz" if is_file_of_arrays else "png")


def _is_of_unknown_format(place: Place) -> bool:
    """Whether a name has the ending of a file, though not of one that is written: `a.foo`, and not `ema_0.9999`."""
    ending = re.search(r"[^./]\.([A-Za-z][A-Za-z0-9]{0,11})$", place)
    return ending is not None and (place.is_remote or not Path(place).is_dir())


def parse_classes(text: str | None) -> tuple[int, ...] | Literal["random"] | None:
    """Parses `--classes 1,2` or `--classes random`. Raises ValueError."""
    if text is None:
        return None
    if text == "random":
        return "random"
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in text.split(",")):
        raise ValueError(f"got {text!r}; write random, or whole numbers such as 1,2")
    return tuple(int(part) for part in text.split(","))


def check_classes(classes: tuple[int, ...] | Literal["random"] | None, config: Config, *, origin: str) -> None:
    """Checks that a model has these classes.

    Raises:
        UserError: classes are given to an unconditional network, are missing, or do not exist.
    """
    count = config.model.num_classes
    if count is None:
        if classes is not None:
            raise UserError(f"--classes: {origin} is unconditional (model.num_classes is not set); leave it out")
        return
    if classes is None:
        raise UserError(f"{origin}: is class-conditional; give --classes random, or numbers from 0 to {count - 1}")
    if classes != "random" and max(classes) >= count:
        raise UserError(f"--classes: {max(classes)} is not a class of {origin}; choose from 0 to {count - 1}")
