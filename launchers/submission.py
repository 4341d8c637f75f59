"""Reads and writes the files of one submission: its job, reports of its ranks, and how its starts ended."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cmscale.config.draw_request import DrawRequest
from cmscale.config.source_request import request_from
from cmscale.errors import UserError
from cmscale.io.durable import explained, replace_durably
from cmscale.io.json_text import parse_json
from cmscale.io.local import LocalStorage
from cmscale.runs.checkpoints import committed_steps
from cmscale.runs.folder import RunDir
from cmscale.runs.generations import claimed_by, highest_claimed
from cmscale.runs.log import append_line, read_lines, write_event
from cmscale.runs.sample_sets import SetPlace, place_of_seed, set_place, stored_parts
from launchers import jobs
from launchers.judge import SUPERSEDED, Attempt, RankEnd, RankFailure

_READ_AT_ONCE = 16  # reports of ranks
_BESIDE = {jobs.EVALUATE: "evaluation", jobs.SAMPLE: "sampling"}


@dataclass(frozen=True)
class JobRecord:
    """The file `job.json`: what the ranks of every start run, and the id of the newest Slurm job.

    Attributes:
        after: The number of the run's newest start (`cmscale.runs.generations`) when the job was submitted.
        code: The folder with the code that was submitted; None for jobs of versions that did not copy it.
    """

    worker: str
    arguments: tuple[Any, ...]
    job_id: str | None
    after: int = 0
    code: str | None = None


@dataclass(frozen=True)
class Submission:
    """A folder `logs/submissions/NAME` of a run. `NAME/START/` holds the reports of the ranks of one start."""

    run: RunDir
    name: str

    @property
    def folder(self) -> Path:
        return self.run.logs / "submissions" / self.name

    @property
    def job_file(self) -> Path:
        return self.folder / "job.json"

    @property
    def script(self) -> Path:
        """The batch script, which every start runs; only on clusters that have one."""
        return self.folder / "job.sh"

    @property
    def ending_file(self) -> Path:
        """Written when the job has ended for good."""
        return self.folder / "ending.json"

    def write_job(
        self, worker: str, arguments: tuple[Any, ...], *, job_id: str | None = None, code: Path | str | None = None
    ) -> None:
        """Writes the job, whose starts run it.

        Raises:
            UserError: it can't be written, or the ranks' logs could not be.
        """
        LocalStorage(self.run.logs).check_writable("JOB_0_log.out")
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        code = None if code is None else str(code)
        self._write(JobRecord(worker, arguments, job_id, after=highest_claimed(self.run), code=code))

    def replace_job_id(self, job_id: str) -> None:
        """Records that the job goes on under another id."""
        self._write(replace(self.read_job(), job_id=job_id))

    def _write(self, record: JobRecord) -> None:
        optional = {"job_id": record.job_id, "after": record.after, "code": record.code}
        value = {"worker": record.worker, "arguments": list(record.arguments)}
        self._write_json(self.job_file, value | {name: given for name, given in optional.items() if given})

    def read_job(self) -> JobRecord:
        """The job, also as older versions wrote it (without arguments, the worker under its former name).

        Raises:
            UserError: the file is missing or damaged.
        """
        value = read_json(self.job_file)
        if value is None or not isinstance(value.get("worker"), str):
            raise UserError(
                f"{self.job_file}: missing or damaged, so the job cannot start again; submit it once more, "
                "or --resume the run where it is now, if it was moved"
            )
        arguments = tuple(value.get("arguments", ()))
        worker = jobs.current_name(value["worker"])
        return JobRecord(worker, arguments, value.get("job_id"), value.get("after", 0), value.get("code"))

    @property
    def beside(self) -> str | None:
        """What the job does beside the run's training: `evaluation` or `sampling`; None if it trains."""
        with contextlib.suppress(UserError):
            return _BESIDE.get(self.read_job().worker)
        return None

    def _stored(self) -> str:
        """How much of its work a job beside the training has stored."""
        if self.beside == "evaluation":
            return stored_measurements(self.run)
        try:
            return f"{stored_parts(_sets_of(self.read_job().arguments[0]))} parts of samples"
        except (UserError, OSError) as error:  # a storage that is away
            return f"an unknown number of parts of samples ({error})"

    @property
    def how_to_go_on(self) -> str:
        """What a user does to continue the job after it was stopped."""
        if self.beside:
            return "the same command continues with what is missing"
        return "continue with --resume"

    def write_rank_end(self, start: str, end: RankEnd) -> None:
        self._write_json(self.folder / start / f"rank-{end.rank:04d}.json", asdict(end))

    def write_exits(self, start: str, exits: dict[str, Any]) -> None:
        """Writes how the processes of a start on this machine ended."""
        self._write_json(self.folder / start / "exits.json", exits)

    def exits(self, start: str) -> dict[str, Any] | None:
        """What `write_exits` has written; None if it has not."""
        return read_json(self.folder / start / "exits.json")

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        replace_durably(path, (json.dumps(value, indent=1) + "\n").encode(), within=self.run.root)

    def rank_ends(self, start: str) -> list[RankEnd]:
        """The last reports of the ranks of a start, oldest first."""
        files = list((self.folder / start).glob("rank-*.json"))
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:  # on a parallel file system each takes a millisecond
            found = pool.map(lambda path: (path.stat().st_mtime_ns, read_json(path)), files)
            reports = sorted(found, key=lambda report: report[0])
        return [RankEnd(**value) for _, value in reports if value is not None]

    def explained(self, start: str, failure: RankFailure | None) -> RankFailure | None:
        """The failure, with what a rank's watch recorded before it killed the rank, which hung and could not.

        If all ranks but one wait for others, that one hangs, whichever was killed first.

        Args:
            start: The start in which the rank failed; watches of other starts say nothing about it.
        """
        if failure is None or self.beside or "killed" not in failure.how.lower():
            return failure
        late: dict[int, dict[str, Any]] = {}
        for event in read_lines(self.run.events):
            if event.get("start") == f"{self.name}/{start}" and type(rank := event.get("rank")) is int:
                if event.get("event") == "fault":
                    late[rank] = event
                else:
                    late.pop(rank, None)
        hosts = {end.rank: end.host for end in self.rank_ends(start)}
        hung = hosts.keys() - {rank for rank, event in late.items() if event.get("waits_for_others")}
        if late and len(hosts) > len(hung) == 1:
            (rank,) = hung
            how = str(late[rank].get("why", "")) if rank in late else "hangs: all other ranks wait for it"
            return RankFailure(rank, hosts[rank], how)
        why = str(late[failure.rank].get("why", "")) if failure.rank in late else ""
        return replace(failure, how=why) if why else failure

    def record(self, attempt: Attempt) -> list[Attempt]:
        """Appends a start that ended to the history. Returns the whole history, oldest first."""
        if attempt.ending not in ("finished", "user_error") and self.overtaken():
            attempt = replace(attempt, ending="superseded", message=SUPERSEDED)
        if self.beside:
            measured = self._stored()
            interrupted = attempt.ending in ("preempted", "time_limit", "cancelled")
            attempt = replace(attempt, measured=measured, message=measured if interrupted else attempt.message)
        file = self.folder / "attempts.jsonl"
        append_line(file, asdict(attempt), durable=True)
        return [*_attempts(read_lines(file))]

    def overtaken(self) -> bool:
        """Whether another job has started the run since: it owns the run now, and this one is not started again."""
        newest = highest_claimed(self.run)
        with contextlib.suppress(UserError):
            if self.beside or newest <= self.read_job().after:
                return False
        claim = claimed_by(self.run, newest)
        return claim is not None and claim.partition("/")[0] != self.name

    def has_moved_on(self, job_id: str | None) -> bool:
        """Whether a later Slurm job than `job_id` carries this submission on: two must not work at once."""
        with contextlib.suppress(UserError):
            current = self.read_job().job_id
            if job_id and current and current.isdecimal() and job_id.isdecimal():
                return int(current) > int(job_id)
        return False

    def report(self, event: str, attempt: Attempt, *, why: str) -> None:
        """Writes an event to the run's events.jsonl: of an evaluation with the prefix `evaluation_`, or `sampling_`."""
        name = f"{self.beside}_{event}" if self.beside else event
        write_event(self.run, name, step=max(attempt.step, 0), rank=attempt.rank, why=why)

    def end(self, attempt: Attempt, *, why: str) -> None:
        """Writes that the job has ended for good."""
        self._write_json(self.ending_file, {**asdict(attempt), "why": why})


def _sets_of(asked: dict[str, Any]) -> list[SetPlace]:
    """The places of the sets that a job draws."""
    request = request_from(DrawRequest, asked)
    seeds = range(request.seed, request.seed + request.seeds)
    return [set_place(place_of_seed(request.out, seed, request.seeds), request.format_asked()) for seed in seeds]


def _attempts(records: Iterable[dict[str, Any]]) -> Iterator[Attempt]:
    """The starts in a history; a record that a crash damaged, or that another version wrote, counts as none."""
    for record in records:
        with contextlib.suppress(TypeError):
            yield Attempt(**record)


def submissions_of(run: RunDir) -> list[Submission]:
    """The submissions of a run, oldest first."""
    return [Submission(run, path.parent.name) for path in sorted(run.logs.glob("submissions/*/job.json"))]


def stored_measurements(run: RunDir) -> str:
    """How much the evaluations of a run have measured so far."""
    # Not by glob, which fails if another evaluation of the run removes its blocks meanwhile.
    names = [name for _, _, files in os.walk(run.evaluation_progress) for name in files]
    sets, blocks = sum(name.endswith(".json") for name in names), sum(name.startswith("block-") for name in names)
    return f"{sets} sets and {blocks} blocks of samples"


def newest_step(run: RunDir) -> int:
    """The step of the newest committed checkpoint in the run's folder; -1 if there is none."""
    return max(committed_steps(run), default=-1)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = parse_json(path.read_bytes())
        return found if isinstance(found, dict) else None
    return None
