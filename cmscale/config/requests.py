"""Defines what the evaluation commands can be asked: one model per command.

The flags of `launchers/evaluate.py`, the options of `cmscale evaluate` and `cmscale search-times`, and the JSON of an
evaluation job all follow from these models (`options_of`), so that an option exists once.
"""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cmscale.config.features import feature_networks
from cmscale.config.models import Evaluate


def _option(
    default: Any,
    help: str,
    *,
    metavar: str = "",
    flag: str = "",
    is_path: bool = False,
    is_positional: bool = False,
    is_internal: bool = False,
    **constraints: Any,
) -> Any:
    """A field with what its option shows.

    Args:
        flag: The option's name, where it is not the field's.
        is_path: Whether the value is a local path or a URL (or ends in .json: a file).
        is_positional: Whether it is an argument without a flag.
        is_internal: Whether no user gives it.
    """
    extra = {
        "metavar": metavar,
        "flag": flag,
        "is_path": is_path,
        "is_positional": is_positional,
        "is_internal": is_internal,
    }
    return Field(default, description=help, json_schema_extra=extra, **constraints)


class MeasuringRequest(BaseModel):
    """Which network is measured, and against what. None leaves a value to the config of the source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = _option(
        ...,
        "A run, a checkpoint, an exported file or an OpenAI .pt; a local path or s3://.",
        metavar="SOURCE",
        is_path=True,
        is_positional=True,
    )
    overrides: list[str] = _option([], "Values of --config to replace.", metavar="[KEY=VALUE]...", is_positional=True)
    reference: str | None = _option(
        None,
        "A prepared data set, a folder of images, or a statistics file. Default: the config's, else its data.",
        metavar="PATH",
        is_path=True,
    )
    samples: int | None = _option(
        None, "Samples per evaluation. Default: evaluate.num_samples of the config.", metavar="N", ge=2
    )
    features: str | None = _option(
        None,
        f"Network whose features are compared: {', '.join(feature_networks())}. "
        "Default: evaluate.features of the config.",
        metavar="NAME",
    )
    features_weights: str | None = _option(
        None, "Weights of that network; local path or s3://.", metavar="PATH[#sha256=HEX]", is_path=True
    )
    inception_weights: str | None = _option(
        None, "The same, for inception only.", metavar="PATH[#sha256=HEX]", is_path=True
    )
    dinov2_weights: str | None = _option(None, "The same, for dinov2 only.", metavar="PATH[#sha256=HEX]", is_path=True)
    config: str | None = _option(
        None, "Config of a SOURCE that has none (OpenAI .pt, ...).", metavar="CONFIG", is_path=True
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto uses CUDA if there is a device.")
    force: bool = _option(False, "Measure anew what has been measured already, and replace the result.")

    def settings(self, configured: Evaluate) -> Evaluate:
        """The config's `evaluate` section with the values of the request.

        Raises:
            UserError: a value is not allowed.
        """
        given = {
            "features": self.features,
            "features_weights": self.features_weights,
            "inception_weights": self.inception_weights,
            "dinov2_weights": self.dinov2_weights,
            "reference": self.reference,
            "num_samples": self.samples,
        }
        return configured.replaced(given)


class EvaluateRequest(MeasuringRequest):
    """What to evaluate, and how."""

    out: str | None = _option(
        None, "Result. Default: a file in the run's evaluations/.", metavar="FILE.json", is_path=True
    )
    steps: str | None = _option(None, "Numbers of sampling steps. Default: the method's.", metavar="1,2")
    times: str | None = _option(
        None,
        "Descending sigmas to sample at, or the JSON of search-times.",
        metavar="80,4.4|FILE.json",
        is_path=True,
    )
    seeds: int = _option(1, "Independent sets of samples, for standard deviations.", metavar="N", ge=1)
    weights: str | None = _option(
        None, "EMA names, or master, separated by commas. Default: the first EMA.", metavar="A,B"
    )
    checkpoints: str = _option(
        "latest", "Steps of a run's checkpoints, separated by commas.", metavar="0,latest", flag="step"
    )
    run_dir: str | None = _option(None, "Where a source that is no run keeps its results.", is_internal=True)


class SearchTimesRequest(MeasuringRequest):
    """Whose sampling times to search, and how."""

    steps: int = _option(2, "Number of sampling times; the first is sigma_max.", metavar="N", ge=2)
    seed: int = _option(0, "Seed of the samples of every trial.", metavar="N", ge=0)
    out: str | None = _option(
        None, "Result. Default: a file in the run's evaluations/times/.", metavar="FILE.json", is_path=True
    )
    weights: str | None = _option(None, "An EMA's name, or master. Default: the first EMA.", metavar="NAME")
    step: str = _option("latest", "Step of a run's checkpoint, or latest.", metavar="STEP")


@dataclass(frozen=True)
class Option:
    """A field of a request as an option of a command line.

    Attributes:
        name: The field's.
        flag: `--step`; empty for an argument without a flag.
        kind: Type of one value: int, str, or bool for a switch.
        is_list: Whether it takes any number of values.
        minimum: The smallest number allowed; None if there is none.
        choices: The values allowed; empty if there is no list.
        default: `...` for an argument that must be given.
    """

    name: str
    flag: str
    kind: type
    is_list: bool
    minimum: int | None
    choices: tuple[str, ...]
    default: Any
    help: str
    metavar: str
    is_path: bool


def options_of(request: type[BaseModel]) -> Iterator[Option]:
    """The options that a user can give, positional arguments first."""
    fields = [(name, field) for name, field in request.model_fields.items() if not _extra(field)["is_internal"]]
    for name, field in sorted(fields, key=lambda item: not _extra(item[1])["is_positional"]):
        extra = _extra(field)
        kind = _single(field.annotation)
        choices = tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()
        minimum = next((each.ge for each in field.metadata if hasattr(each, "ge")), None)
        yield Option(
            name=name,
            flag="" if extra["is_positional"] else f"--{(extra['flag'] or name).replace('_', '-')}",
            kind=str if choices or kind not in (int, str, bool) else kind,
            is_list=get_origin(field.annotation) is list,
            minimum=minimum,
            choices=choices,
            default=... if field.default is PydanticUndefined else field.default,
            help=field.description or "",
            metavar=extra["metavar"],
            is_path=extra["is_path"],
        )


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return dict(field.json_schema_extra)


def _single(annotation: Any) -> Any:
    """The type of one value: `int` of `int | None`, `str` of `list[str]`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _single(next(part for part in get_args(annotation) if part is not types.NoneType))
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    return annotation
