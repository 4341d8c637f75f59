"""Defines what the evaluation commands can be asked: one model per command.

The flags of `launchers/evaluate.py`, the options of `cmscale evaluate` and `cmscale search-times`, and the JSON of an
evaluation job all follow from these models: see `cmscale.config.source_request`.
"""

from pydantic import Field, field_validator

from cmscale.commands.parser import Output
from cmscale.commands.situation import MODELS, RUN, WITH_WEIGHTS_TO_CHOOSE
from cmscale.commands.use import USED, Use
from cmscale.config.averages import length_of
from cmscale.config.draw_request import Format, format_of
from cmscale.config.evaluate import Evaluate
from cmscale.config.features import feature_networks, known_network
from cmscale.config.methods.base import MOST_STEPS
from cmscale.config.models import Config
from cmscale.config.request_fields import option
from cmscale.config.sampling_times import check_range, check_steps, is_file, parse_counts, parse_step, parse_times
from cmscale.config.source_request import SourceRequest
from cmscale.errors import UserError
from cmscale.io.place import Place


class MeasuringRequest(SourceRequest):
    """Which network is measured, and against what. None leaves a value to the config of the source."""

    reference: Place | None = option(
        None,
        "A prepared data set, a folder of images, or a statistics file. Default: the config's, else its data.",
        use=USED,
        metavar="PATH",
    )
    samples: int | None = option(
        None,
        "Samples per evaluation. Default: evaluate.num_samples of the config.",
        use=Use(source=MODELS),
        metavar="N",
        ge=2,
    )
    features: str | None = option(
        None,
        f"Network whose features are compared: {', '.join(feature_networks())}. "
        "Default: evaluate.features of the config.",
        use=USED,
        metavar="NAME",
    )
    features_weights: Place | None = option(
        None, "Weights of that network; local path or s3://.", use=USED, metavar="PATH[#sha256=HEX]"
    )
    inception_weights: Place | None = option(
        None,
        "The same, for inception only.",
        use=Use(features=("inception features",), excludes=("features_weights",)),
        metavar="PATH[#sha256=HEX]",
    )
    dinov2_weights: Place | None = option(
        None,
        "The same, for dinov2 only.",
        use=Use(features=("dinov2 features",), excludes=("features_weights",)),
        metavar="PATH[#sha256=HEX]",
    )
    force: bool = option(False, "Measure anew what has been measured already, and replace the result.", use=USED)

    @field_validator("features")
    @classmethod
    def _known_features(cls, name: str | None) -> str | None:
        return None if name is None else known_network(name)

    def settings(self, configured: Evaluate) -> Evaluate:
        """The config's `evaluate` section with the values of the request.

        Raises:
            UserError: a value is not allowed, or weights are given of a network that is not used.
        """
        given = {
            "features": self.features,
            "features_weights": self.features_weights,
            "inception_weights": self.inception_weights,
            "dinov2_weights": self.dinov2_weights,
            "reference": self.reference,
            "num_samples": self.samples,
        }
        self.refuse_unused(features=f"{self.features or configured.features} features")
        return configured.replaced(given)


class EvaluateRequest(MeasuringRequest):
    """What to evaluate, and how."""

    out: Place | None = option(
        None,
        "Result. Default: a file in the run's evaluations/.",
        use=USED,
        metavar="FILE.json",
        output=Output((".json",)),
    )
    steps: str | None = option(
        None,
        "Numbers of sampling steps. Default: the method's.",
        use=Use(source=MODELS, excludes=("times",)),
        metavar="1,2",
    )
    times: Place | None = option(
        None,
        "Descending sigmas to sample at, or the JSON of search-times.",
        use=Use(source=MODELS),
        metavar="80,4.4|FILE.json",
        flag="sampling_times",
    )
    seeds: int = option(
        1,
        "Independent sets of samples, for standard deviations.",
        use=Use(source=MODELS),
        metavar="N",
        ge=1,
    )
    weights: str | None = option(
        None,
        "EMA names, or master, separated by commas. Default: the first EMA.",
        use=Use(source=WITH_WEIGHTS_TO_CHOOSE),
        metavar="A,B",
    )
    checkpoints: str = option(
        "latest",
        "Steps of a run's checkpoints, separated by commas.",
        use=Use(source=(RUN,)),
        metavar="0,latest",
        flag="checkpoint",
    )
    keep_samples: Place | None = option(
        None,
        "Keep the samples that are measured: FILE.npz, or a folder; several sets get a folder each in it.",
        use=Use(source=MODELS),
        metavar="PLACE",
    )
    format: Format | None = option(
        None,
        "Of the samples that are kept: npz, png or tar (PNG files in tars of 512). Default: by their place.",
        use=Use(needs=("keep_samples",)),
    )
    run_dir: str | None = Field(None, description="Where a source that is no run keeps its results.")

    @field_validator("steps")
    @classmethod
    def _counts(cls, text: str | None) -> str | None:
        if text is not None:
            parse_counts(text)
        return text

    @field_validator("times")
    @classmethod
    def _descending(cls, text: Place | None) -> Place | None:
        if text is not None and not is_file(text):
            parse_times(text)
        return text

    @field_validator("checkpoints")
    @classmethod
    def _steps(cls, text: str) -> str:
        for part in text.split(","):
            parse_step(part)
        return text

    @property
    def steps_asked(self) -> tuple[int | None, ...]:
        """The steps of the checkpoints to evaluate; None is the newest."""
        return tuple(parse_step(part) for part in self.checkpoints.split(","))

    @property
    def weights_asked(self) -> tuple[str | None, ...]:
        """The names of the weights to evaluate; None is the first EMA."""
        return (None,) if self.weights is None else tuple(name.strip() for name in self.weights.split(","))

    @property
    def num_evaluations(self) -> int:
        """How many results are asked for."""
        steps = 1 if self.steps is None else len(self.steps.split(","))
        return len(self.steps_asked) * len(self.weights_asked) * steps

    @property
    def kept_format(self) -> Format:
        """The format of the samples that are kept.

        Raises:
            UserError: it contradicts the name of their place.
        """
        assert self.keep_samples is not None
        return format_of(self.keep_samples, self.format, option="--keep-samples")

    def refuse_several_in_one_file(self) -> None:
        """Raises UserError if `out` names one file for several evaluations, or `keep_samples` for several sets."""
        count = self.num_evaluations
        if self.out is not None and count > 1:
            raise UserError(f"--out {self.out}: one file can't hold {count} evaluations; ask for one")
        sets = count * self.seeds
        if self.keep_samples is not None and self.kept_format == "npz" and sets > 1:
            raise UserError(
                f"--keep-samples {self.keep_samples}: one file can't hold {sets} sets of samples; name a folder"
            )

    def check_fits(self, config: Config) -> None:
        """Checks names of weights, and times, before anything is measured.

        Raises:
            UserError: the model has no such weights, or a time is outside its range, also one that two steps take by
                default.
        """
        known = (*config.ema.names, *config.ema.power_names, "master")
        for name in self.weights_asked:
            if name is not None and length_of(name) is not None and config.ema.lengths:
                continue  # it is computed
            if name is not None and "weights" in self.model_fields_set and name not in known:
                raise UserError(f"--weights {name}: no such weights; choose from {', '.join(known)}")
        if self.times is not None and not is_file(self.times):
            check_range(parse_times(self.times), config.method, label=f"--sampling-times {self.times}")
        own = config.sampling.times
        for steps in () if self.steps is None else parse_counts(self.steps):
            if own is None or len(own) != steps:
                check_steps(config.method, steps)


class SearchTimesRequest(MeasuringRequest):
    """Whose sampling times to search, and how."""

    steps: int = option(
        2, "Number of sampling times; the first is sigma_max.", use=USED, metavar="N", ge=2, le=MOST_STEPS
    )
    seed: int = option(0, "Seed of the samples of every trial.", use=USED, metavar="N", ge=0)
    out: Place | None = option(
        None,
        "Result. Default: a file in the run's evaluations/times/.",
        use=USED,
        metavar="FILE.json",
        output=Output((".json",), local="the result of a search, which is written after every trial,"),
    )
    weights: str | None = option(
        None,
        "An EMA's name, or master. Default: the first EMA.",
        use=Use(source=WITH_WEIGHTS_TO_CHOOSE),
        metavar="NAME",
    )
    step: str = option(
        "latest", "Step of a run's checkpoint, or latest.", use=Use(source=(RUN,)), metavar="STEP", flag="checkpoint"
    )

    @field_validator("step")
    @classmethod
    def _one_step(cls, text: str) -> str:
        parse_step(text)
        return text
