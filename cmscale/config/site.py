"""Reads a site's defaults: the site file, beside what the user told sbatch by variables SBATCH_*.

The site file is CMSCALE_SITE, else `cmscale/site.yaml` in XDG_CONFIG_HOME, else `~/.config/cmscale/site.yaml`. It holds
sections of a config (the keys that do not change the losses), `flags` and `environment`. Its values lie beneath those
of a config: default < site file < SBATCH_* < config file < key=value < flag.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cmscale.config.evaluate import Evaluate
from cmscale.config.files import validated
from cmscale.config.layers import Layer
from cmscale.config.mirrors import Prometheus, Tensorboard, Wandb
from cmscale.config.mistakes import Mistake, explain, refusal, unknown
from cmscale.config.sbatch_variables import environment_layers
from cmscale.config.section import Section
from cmscale.config.sections import Checkpoint, Data, Engine, Restart
from cmscale.config.slurm import Slurm, Text
from cmscale.config.storage import StorageKeys
from cmscale.config.written import as_written
from cmscale.config.yaml_text import parse_sections, place, read_yaml_text
from cmscale.errors import UserError
from cmscale.io.place import Place
from cmscale.io.reading import why_no_file

SECTIONS: dict[str, type[Section]] = {
    "slurm": Slurm,
    "restart": Restart,
    "data": Data,
    "engine": Engine,
    "checkpoint": Checkpoint,
    "evaluate": Evaluate,
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "prometheus": Prometheus,
    "storage": StorageKeys,
}
"""Sections whose keys a site may set, as far as they do not change the losses; `data.path` is a run's own."""

_FLAGS_OF_SLURM = ("partition", "nodes", "gpus_per_node", "time")


class SiteFlags(BaseModel):
    """Defaults of the launchers' flags that are no keys of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cluster: Literal["auto", "slurm", "local"] | None = None
    runs_dir: Text | None = None


@dataclass(frozen=True)
class Site:
    """What a site file says; nothing if there is none.

    Attributes:
        origin: The file in words.
        tree: Values of the config, by section and key.
        environment: Variables to set for every command and job, unless they are set already.
    """

    origin: str = ""
    tree: Mapping[str, Any] = field(default_factory=dict)
    flags: SiteFlags = field(default_factory=SiteFlags)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def layer(self) -> Layer:
        """The site's values, as configs lie on them."""
        return Layer(self.origin, self.tree)

    @property
    def runs_dir(self) -> Place:
        """The folder of runs, where a command names no other."""
        return Place(self.flags.runs_dir or "runs")

    @property
    def storage(self) -> StorageKeys:
        """The section `storage`, for commands without a config."""
        return StorageKeys.model_validate(self.tree.get("storage", {}))


class LaunchSettings(Section):
    """The sections of a config that say how a job is launched, for commands that work without a config."""

    slurm: Slurm = Slurm()
    restart: Restart = Restart()


def is_launch_key(override: str) -> bool:
    """Whether an override `key=value` says how a job is launched."""
    return override.partition(".")[0] in LaunchSettings.model_fields


def read_launch_settings(overrides: list[str], origins: dict[str, str] | None = None) -> LaunchSettings:
    """How to launch a job that has no config: the site's values, the environment's, and `key=value` over them.

    Raises:
        UserError: a key or value is not allowed.
    """
    layers = [Layer(layer.origin, _only(LaunchSettings, layer.tree)) for layer in site_layers()]
    for override in overrides:
        if not is_launch_key(override):
            raise UserError(f"override {override!r}: only keys of slurm and restart can be given here")
    return validated(LaunchSettings, layers, overrides, origin="launch settings", origins=origins)


def _only(model: type[BaseModel], tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in tree.items() if name in model.model_fields}


def site_layers() -> list[Layer]:
    """The layers beneath a config, the lowest first: the site file, then the variables SBATCH_* of this process.

    Raises:
        UserError: the file or a variable holds a value that is not allowed.
    """
    return [read_site().layer, *environment_layers(os.environ)]


def use_site(*, interactive: bool = True) -> Site:
    """Reads the site file, sets its variables for this process and its children, and uses storages as it says.

    Variables that are set already stay.

    Args:
        interactive: Somebody watches: do not wait long for storage that does not answer.
    """
    site = read_site()
    for name, value in site.environment.items():
        os.environ.setdefault(name, value)
    site.storage.apply(interactive=interactive)
    return site


def site_file() -> Path | None:
    """The site file; None if there is none.

    Raises:
        UserError: CMSCALE_SITE names a file that does not exist.
    """
    given = os.environ.get("CMSCALE_SITE")
    if given is not None:
        path = Path(given).expanduser()
        if given and not path.is_file():
            raise UserError(
                f"CMSCALE_SITE: {given}: {why_no_file(path)}; unset it, or set it to nothing for no site file"
            )
        return path if given else None
    path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "cmscale" / "site.yaml"
    return path if path.is_file() else None


def read_site() -> Site:
    """What the site file says.

    Raises:
        UserError: it can't be read, or holds keys or values that are not allowed; the lines name the file.
    """
    path = site_file()
    return Site() if path is None else _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, _: int) -> Site:
    origin = f"site file {path}"
    read = parse_sections(read_yaml_text(path, what="site file"), origin)
    tree = {name: {} if values is None else values for name, values in read.tree.items()}

    def where(key: str) -> str:
        return place(origin, read.lines.get(key, read.lines.get(key.partition(".")[0])))

    if wrong := list(_misshapen(tree)):
        raise refusal(wrong, where)
    for name, values in tree.items():
        if name != "slurm":
            tree[name] = _expanded(values, name, wrong)
    flags, environment = tree.pop("flags", {}), tree.pop("environment", {})
    moved = {}
    for key in _FLAGS_OF_SLURM:
        if key in flags:
            moved[f"slurm.{key}"] = f"flags.{key}"
            if key in tree.setdefault("slurm", {}):
                wrong.append(Mistake("", f"flags.{key} and slurm.{key} are both given; remove one of them"))
            tree["slurm"][key] = flags.pop(key)
    for name, values in tree.items():
        wrong += (replace(each, key=moved.get(each.key, each.key)) for each in _of_section(name, values))
    wrong += _of_model(SiteFlags, flags, "flags")
    wrong += _of_variables(environment)
    if wrong:
        raise refusal(wrong, where)
    variables = {name: str(as_written(value)) for name, value in environment.items()}
    return Site(origin, tree, SiteFlags.model_validate(flags), variables)


def _misshapen(tree: dict[str, Any]) -> Iterator[Mistake]:
    for name, values in tree.items():
        if name not in (*SECTIONS, "flags", "environment"):
            sections = ", ".join((*SECTIONS, "flags"))
            yield Mistake(str(name), f"unknown section; a site sets {sections} or environment")
        elif not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            yield Mistake(name, f"got {values!r}; write keys and values")


def _of_section(name: str, values: dict[str, Any]) -> list[Mistake]:
    """The mistakes in a section's values."""
    model = SECTIONS[name]
    found = []
    for key in values:
        field_of_key = model.model_fields.get(key)
        if field_of_key is None:
            found.append(unknown(f"{name}.{key}"))
            continue
        extra = field_of_key.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("operational")) or f"{name}.{key}" == "data.path":
            found.append(Mistake(f"{name}.{key}", "belongs to each run; a site can't set it"))
    known = {key: value for key, value in values.items() if key in model.model_fields}
    return found + _of_model(model, {"path": "unused", **known} if model is Data else known, name)


def _of_model(model: type[BaseModel], values: dict[str, Any], name: str) -> list[Mistake]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return explain(error, section=name)
    return []


def _of_variables(given: dict[str, Any]) -> Iterator[Mistake]:
    for name, value in given.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or isinstance(value, (dict, list, type(None), bool)):
            yield Mistake(f"environment.{name}", f"got {value!r}; write NAME: text")
        elif "\n" in str(value) or "\0" in str(value):
            yield Mistake(f"environment.{name}", f"got {value!r}; line breaks are not allowed")


def _expanded(values: Any, name: str, wrong: list[Mistake]) -> Any:
    """Values with `~` and `$NAME` replaced, as a site's users share its file. Adds what can't be to `wrong`."""
    if isinstance(values, dict):
        return {key: _expanded(value, f"{name}.{key}", wrong) for key, value in values.items()}
    if not isinstance(values, str):
        return values
    text = os.path.expanduser(os.path.expandvars(values))  # noqa: PTH111
    if missing := re.search(r"\$(\w+|\{[^}]*\})", text):
        wrong.append(Mistake(name, f"{missing[0]} is not set; got {values!r}"))
    return text
