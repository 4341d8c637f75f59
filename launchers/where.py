"""Decides where a job runs: each value from a flag, a key, what the run recorded, the config, or a default."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import PositiveInt

from cmscale.commands.situation import SLURM, THIS_MACHINE
from cmscale.commands.use import Given
from cmscale.config import Slurm, leaves
from cmscale.config.layers import COMMAND_LINE
from cmscale.config.site import LaunchSettings, read_site
from cmscale.config.slurm import parse_gpus, parse_minutes
from cmscale.errors import UserError
from cmscale.io.durable import replace_durably
from cmscale.runs.folder import RunDir
from cmscale.runs.manifests import Document, read_document
from launchers.clusters import CLUSTERS, place
from launchers.clusters.local import LocalMachine
from launchers.placement import Device, Placement, PlacementRequest

DEFAULT, FLAG = "default", "flag"


class Recorded(Document):
    """The file `placement.json` of a run: where its newest job was sent, for `--resume`."""

    cluster: str
    nodes: PositiveInt
    gpus_per_node: int | str
    partition: str | None
    minutes: PositiveInt | None
    evaluate_every: PositiveInt | None = None

    @classmethod
    def of(cls, placement: Placement, *, evaluate_every: int | None) -> "Recorded":
        count = placement.ranks_per_node
        gpus = f"{placement.gpu_type}:{count}" if placement.gpu_type else count
        return cls(
            cluster=placement.cluster,
            nodes=placement.nodes,
            gpus_per_node=gpus,
            partition=placement.partition,
            minutes=placement.minutes,
            evaluate_every=evaluate_every,
        )

    def write(self, run: RunDir) -> None:
        replace_durably(run.placement, self.to_bytes())


def read_recorded(run: RunDir) -> Recorded | None:
    """Where a run ran; None for runs of releases that did not record it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        found = read_document(Recorded, run.placement.read_bytes(), origin="placement")
        parse_gpus(found.gpus_per_node)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{run.placement}: damaged ({error}); delete it, and give --nodes, --gpus-per-node, --partition and --time"
        ) from None
    return found


@dataclass(frozen=True)
class Where:
    """A placement, and for each of its values the origin: rows of (name, value, origin)."""

    placement: Placement
    rows: tuple[tuple[str, str, str], ...]

    def with_row(self, name: str, value: str, origin: str) -> "Where":
        return replace(self, rows=(*self.rows, (name, value, origin)))


class _Chooser:
    """Chooses values for one cluster and notes where they came from."""

    def __init__(
        self,
        flags: argparse.Namespace,
        settings: LaunchSettings,
        origins: Mapping[str, str],
        *,
        cluster: str,
        recorded: Recorded | None,
    ) -> None:
        self.flags = flags
        self.slurm: Slurm = settings.slurm
        self.restart = settings.restart
        self.origins = origins
        self.has_keys = cluster != "local"  # this machine has no use for the section `slurm`
        self.recorded = recorded if recorded is not None and recorded.cluster == cluster else None
        self.rows: list[tuple[str, str, str]] = []

    def choose(self, name: str, key: Any, recorded: Any, default: Any) -> Any:
        """The value of a flag, else of a key on the command line, else recorded, else of a key, else the default."""
        origin = self.origins.get(f"slurm.{name}", DEFAULT)
        candidates = [
            (getattr(self.flags, name), FLAG),
            (key if self.has_keys and origin == COMMAND_LINE else None, f"slurm.{name}, {COMMAND_LINE}"),
            (recorded if self.recorded else None, "placement.json of the run"),
            (key if self.has_keys else None, f"slurm.{name}, {origin}"),
        ]
        value, origin = next(((value, origin) for value, origin in candidates if value is not None), (default, DEFAULT))
        self.rows.append((name.replace("_", " "), "not set" if value is None else str(value), origin))
        return value

    def request(self, *, device: Device, device_option: str, dry_run: bool) -> PlacementRequest:
        slurm: Slurm = self.slurm
        recorded = self.recorded
        gpus = self.choose("gpus_per_node", slurm.gpus_per_node, recorded and recorded.gpus_per_node, None)
        gpu_type, count = (None, None) if gpus is None else parse_gpus(gpus)
        time = self.choose("time", slurm.time, recorded and recorded.minutes, None)
        return PlacementRequest(
            nodes=self.choose("nodes", slurm.nodes, recorded and recorded.nodes, 1),
            ranks_per_node=count,
            partition=self.choose("partition", slurm.partition, recorded and recorded.partition, None),
            minutes=None if time is None else parse_minutes(time),
            device=device,
            dry_run=dry_run,
            device_option=device_option,
            slurm=slurm,
            restart=self.restart,
            gpu_type=gpu_type,
        )


def decide_where(
    flags: argparse.Namespace,
    given: Given,
    settings: LaunchSettings,
    origins: Mapping[str, str],
    *,
    device: Device,
    device_option: str,
    recorded: Recorded | None = None,
) -> Where:
    """The placement that flags, keys and a run's record request.

    Args:
        settings: The sections `slurm` and `restart`.
        origins: Where their values came from, by dotted key.
        device: What ranks compute on.
        device_option: What chooses it, as it is written before the value.
        recorded: Where the run that is resumed ran; used on the same cluster only.

    Raises:
        UserError: the request cannot be met, or a flag has no effect there.
    """
    site = read_site()
    named = (
        (flags.cluster, FLAG),
        (recorded and recorded.cluster, "placement.json of the run"),
        (site.flags.cluster, site.origin),
    )
    wanted, origin = next(((name, origin) for name, origin in named if name), ("auto", DEFAULT))
    if wanted != "auto" and wanted not in CLUSTERS:
        raise UserError(
            f"cluster {wanted!r} ({origin}): there is none of this name; give --cluster {'|'.join(CLUSTERS)}"
        )
    for name in CLUSTERS if wanted == "auto" else (wanted,):
        chooser = _Chooser(flags, settings, origins, cluster=name, recorded=recorded)
        request = chooser.request(device=device, device_option=device_option, dry_run=flags.dry_run)
        if wanted == "auto" and not CLUSTERS[name].suits(request):
            continue
        if name == LocalMachine.name and request.gpu_type:
            raise UserError(
                f"--gpus-per-node {request.gpu_type}:...: only Slurm knows types of GPUs; give a number here"
            )
        placement = place(name, request)
        given.refuse_unused(cluster=THIS_MACHINE if name == LocalMachine.name else SLURM)
        how = origin if wanted != "auto" else f"auto, {origin}"
        return Where(placement, (("cluster", name, how), *chooser.rows))
    raise AssertionError("this machine suits always")


def describe_origins(where: Where, origins: Mapping[str, str], values: Mapping[str, Any], *, file: str) -> str:
    """A table of values and where they came from: those of the placement, and every key that another place set.

    Args:
        values: The values of the config by dotted key.
        file: The origin of all other values; of its own, those that say how the job is launched are shown.
    """
    rows = [*where.rows]
    placed = {"slurm.gpus_per_node", "slurm.time", "slurm.nodes", "slurm.partition"}
    defaults = {key: value for key, value, _ in leaves(LaunchSettings())}
    dull = {key for key in origins if origins[key] == file and values.get(key) == defaults.get(key, values.get(key))}
    for key in sorted(origins.keys() - placed - dull):
        inside, _, name = key.rpartition(".")
        if key in values:
            rows.append((key, _shown(values[key]), origins[key]))
        elif isinstance(values.get(inside), Mapping) and name in values[inside]:
            rows.append((key, _shown(values[inside][name]), origins[key]))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows]
    rest = f"all else: {file}, or a default" if file else "all else: a default"
    return "\n".join(["where the values come from:", *(line.rstrip() for line in lines), rest])


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}..."
