"""Defines the section `slurm`: what sbatch and srun are told, and the options that follow from it."""

import re
import shlex
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, field_validator, model_validator

from cmscale.config.section import AsTuple, AsWritten, Count, NonNegative, Section, operational, plain_text
from cmscale.config.written import WrittenFloat, WrittenInt, as_written

Scalar = str | int | float | bool | None

_TIMES = (
    r"(?P<m>\d+)(:(?P<s>\d+))?",
    r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)",
    r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?",
)
_GPUS = re.compile(r"((?P<type>(?=[^A-Za-z:]*[A-Za-z])[A-Za-z0-9_.+-]+):)?(?P<count>[1-9]\d{0,3})")
_GPU_GRES = re.compile(r"(gres[/:])?gpu(:(?P<type>(?=\d*[^:,=()\d])[^:,=()]+))?([:=](?P<count>\d+))?(\(.*\))?")

MEMORY = frozenset({"mem_gb", "mem", "mem_per_gpu", "mem_per_cpu"})
"""Keys of which one at most applies."""

OWN_OPTIONS = {
    **dict.fromkeys(("output", "error", "open-mode", "job-name"), "cmscale names jobs and logs by the run"),
    **dict.fromkeys(("signal", "requeue", "no-requeue"), "cmscale requeues jobs; see restart.signal_seconds"),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu"), "cmscale starts one rank per GPU"),
    **dict.fromkeys(("gpus", "gpus-per-task", "gpus-per-socket"), "use slurm.gpus_per_node"),
    **dict.fromkeys(("array", "wrap", "parsable", "test-only", "wait", "input"), "cmscale submits by itself"),
}
"""Options of sbatch that `slurm.extra` must not set, and why."""


def parse_minutes(text: str | int) -> int:
    """Minutes, rounded up, of a time limit as Slurm writes it: `90`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM[:SS]`.

    `UNLIMITED` is a year.

    Raises:
        ValueError: it is none of these, or 0.
    """
    if str(text).upper() in ("UNLIMITED", "INFINITE"):
        return 365 * 24 * 60
    for pattern in _TIMES:
        if match := re.fullmatch(pattern, str(text), re.ASCII):
            part = {name: int((value or "0")[:9]) for name, value in match.groupdict().items()}
            seconds = 60 * (60 * (24 * part.get("d", 0) + part.get("h", 0)) + part.get("m", 0)) + part.get("s", 0)
            if 0 < seconds < 60 * 2**31:
                return -(-seconds // 60)
    raise ValueError(f"got {text!r}; write minutes, HH:MM:SS or D-HH:MM")


def parse_gpus(text: str | int) -> tuple[str | None, int]:
    """Type and number of GPUs of a node: `4` is (None, 4), `a100:4` is ("a100", 4).

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(_GPUS, str(text))
    if match is None:
        raise ValueError(f"got {text!r}; write a number, or TYPE:NUMBER such as a100:4")
    return match["type"], int(match["count"])


def _checked_time(value: Any) -> Any:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        parse_minutes(value)
    return value


def _checked_gpus(value: Any) -> Any:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        parse_gpus(value)
    return value


def _joined(value: Any) -> Any:
    """A list as Slurm writes it: `[node1, node2]` is `node1,node2`."""
    if not isinstance(value, (list, tuple)):
        return as_written(value)
    parts = [as_written(part) for part in value]
    return ",".join(parts) if all(isinstance(part, str) for part in parts) else value


def _one_of_exclusive(value: Any) -> Any:
    if not isinstance(value, bool) and value not in ("user", "mcs", "topo"):
        raise ValueError(f"got {value!r}; write true, false, user, mcs or topo")
    return value


Text = Annotated[str, AsWritten, AfterValidator(plain_text)]
TextList = Annotated[str, BeforeValidator(_joined), AfterValidator(plain_text)]
Lines = Annotated[tuple[Text, ...], AsTuple]


class Slurm(Section):
    """What sbatch and srun are told. Every key is an option of sbatch, except for those that say otherwise."""

    partition: TextList | None = operational(
        None, "Partition, or several by comma; as --partition. null: the cluster's."
    )
    nodes: Count | None = operational(None, "Number of nodes; as --nodes. null: 1.", unit="nodes")
    gpus_per_node: Annotated[int | str | None, BeforeValidator(_checked_gpus)] = operational(
        None,
        "GPUs of each node, a number or TYPE:NUMBER such as a100:4; as --gpus-per-node. null: 8 on Slurm.",
        unit="GPUs",
    )
    time: Annotated[int | str | None, BeforeValidator(_checked_time)] = operational(
        None,
        "Time limit of each job: minutes, MM:SS, HH:MM:SS, D-HH or D-HH:MM; as --time. The run goes on in a new job. "
        "null: a day on Slurm, none on this machine.",
        unit="minutes",
    )
    account: Text | None = operational(None, "Account that is charged.")
    qos: Text | None = operational(None, "Quality of service.")
    constraint: Text | None = operational(None, "Features that nodes must have, such as `a100&nvlink`.")
    reservation: TextList | None = operational(None, "Reservation to run in.")
    nodelist: TextList | None = operational(None, "Nodes that the job must have.")
    exclude: TextList | None = operational(None, "Nodes that the job must not have.")
    exclusive: Annotated[bool | str, BeforeValidator(_one_of_exclusive)] = operational(
        False,
        "Whether nodes are shared with no other job; `user`, `mcs` or `topo`: not with those of others of the kind.",
    )
    gres: TextList | None = operational(None, "Generic resources of each node, such as gpu:a100:4,ssd.")
    licenses: TextList | None = operational(None, "Licences that the job takes.")
    dependency: TextList | None = operational(None, "Jobs to wait for, such as afterok:123.")
    comment: Text | None = operational(None, "Comment in Slurm's records.")
    mail_user: TextList | None = operational(None, "Who receives mail about the job.")
    mail_type: TextList | None = operational(None, "Events that mail is sent about, such as END,FAIL.")
    wckey: Text | None = operational(None, "Key under which the job is accounted.")
    cpus_per_task: Count | None = operational(
        8,
        "Processors of each rank: one computes, the others are for data.workers. null: left to Slurm.",
        unit="processors",
    )
    mem_gb: NonNegative | None = operational(
        0, "Memory of each node; 0: all that it has; null: no request. `mem` and the like replace it.", unit="GB"
    )
    mem: Text | None = operational(None, "Memory of each node as Slurm writes it, such as 480G; in place of `mem_gb`.")
    mem_per_gpu: Text | None = operational(None, "Memory for each GPU, such as 80G; in place of `mem_gb`.")
    mem_per_cpu: Text | None = operational(None, "Memory for each processor, such as 4G; in place of `mem_gb`.")
    extra: dict[str, Scalar] = operational(
        {}, "Any other option of sbatch by its long name; true for one without a value: `switches: 1`."
    )
    srun_args: Lines = operational((), "Options of srun, as for containers; no option of sbatch.")
    setup: Lines = operational((), "Lines of shell that the batch script runs first; no option of sbatch.")
    python: Text | None = operational(
        None, "Command of the ranks' interpreter, for example in a container; null: this one. No option of sbatch."
    )
    batch_python: Text | None = operational(
        None,
        "Command of the interpreter of the batch script itself. null: `python`, but this one if srun starts ranks in a "
        "container. No option of sbatch.",
    )

    @field_validator("extra", mode="before")
    @classmethod
    def _options(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found: dict[str, Any] = {}
        for name, value in given.items():
            if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9]+([-_][a-z0-9]+)*", name):
                named = name if isinstance(name, str) and name.strip() and name.isprintable() else repr(name)
                raise ValueError(f"{named}: no option; write its long name without the dashes, such as switches")
            option, key = name.replace("_", "-"), name.replace("-", "_")
            if option in OWN_OPTIONS:
                raise ValueError(f"{name}: can't be set here: {OWN_OPTIONS[option]}")
            if key in cls.model_fields and key not in _NO_OPTIONS:
                raise ValueError(f"{name}: has a key of its own; write slurm.{key}")
            if option in found:
                raise ValueError(f"{name}: is given twice; remove one of them")
            if value is not None and not isinstance(value, (str, int, float, bool)):
                raise ValueError(f"{name}: got {type(value).__name__}; write one value, as in sbatch --{option}=VALUE")
            try:
                value = value.text if isinstance(value, (WrittenInt, WrittenFloat)) else value
                found[option] = plain_text(value) if isinstance(value, str) else value
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    @model_validator(mode="after")
    def _consistent(self) -> "Slurm":
        memory = {"mem": self.mem, "mem_per_gpu": self.mem_per_gpu, "mem_per_cpu": self.mem_per_cpu}
        given = [name for name, value in {"mem_gb": self.mem_gb or None, **memory}.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both given; Slurm takes one of them, so set one to null")
        count = self.gpus_in_gres()
        if count is not None and self.gpus_per_node is not None and parse_gpus(self.gpus_per_node)[1] != count:
            raise ValueError(f"gres {self.gres} and gpus_per_node {self.gpus_per_node} differ; give one of them")
        for name, value in (("python", self.python), ("batch_python", self.batch_python)):
            _words(value, key=name)
        return self

    def gpus_in_gres(self) -> int | None:
        """The GPUs of a node that `gres` requests; None if it requests none."""
        for part in (self.gres or "").split(","):
            if match := re.fullmatch(_GPU_GRES, part.strip()):
                return int(match["count"] or 1)
        return None

    def options(self) -> dict[str, str | bool]:
        """Options of sbatch by long name, except for those that place ranks. True is an option without a value."""
        memory = self.mem if self.mem is not None else None if self.mem_gb is None else f"{self.mem_gb}GB"
        replaced = self.mem_per_gpu is not None or self.mem_per_cpu is not None
        found: dict[str, Scalar] = {
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "nodelist": self.nodelist,
            "exclude": self.exclude,
            "exclusive": self.exclusive,
            "gres": self.gres,
            "licenses": self.licenses,
            "dependency": self.dependency,
            "comment": self.comment,
            "mail-user": self.mail_user,
            "mail-type": self.mail_type,
            "wckey": self.wckey,
            "mem": None if replaced else "0" if memory == "0GB" else memory,
            "mem-per-gpu": self.mem_per_gpu,
            "mem-per-cpu": self.mem_per_cpu,
            **self.extra,
        }
        return {
            name: value if value is True else str(value)
            for name, value in found.items()
            if value is not None and value is not False
        }

    def rank_interpreter(self, own: str) -> list[str]:
        """The command of the ranks' Python, as words; `own` is this process's interpreter."""
        return _words(self.python, key="python") or [own]

    def batch_interpreter(self, own: str) -> list[str]:
        """The same for the batch script's own commands."""
        in_container = any(word.startswith("--container") for word in self.srun_args)
        given = self.batch_python or (None if in_container else self.python)
        return _words(given, key="batch_python") or [own]


_NO_OPTIONS = frozenset({"extra", "srun_args", "setup", "python", "batch_python", "mem_gb"})


def _words(command: str | None, *, key: str) -> list[str]:
    """A command as words.

    Raises:
        ValueError: a quote is not closed.
    """
    try:
        return shlex.split(command or "")
    except ValueError as error:
        raise ValueError(f"{key}: got {command!r}; {error}") from None
