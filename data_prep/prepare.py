"""Prepares a data set: turns a source of images into verified shards, in a folder or on S3.

    python data_prep/prepare.py --source lsun:DIR|folder:DIR|zip:FILE|tars:DIR --format mds|webdataset
        --out DIR|s3://... [--workers W] [--slurm --nodes N [slurm.KEY=VALUE ...]]

Shard k contains the k-th `--samples-per-shard` keys of the sorted source, so any worker can make any shard, with the
same bytes. Records of finished shards are stored under `.progress/`; after an interruption, the same command
continues. The manifest is written last: a folder without it is not a data set. A folder that contains anything else is
refused.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import argparse
import os
from collections.abc import Callable, Iterator, Sequence

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED, Use
from cmscale.config.site import read_launch_settings, use_site
from cmscale.config.slurm import parse_minutes, plain_text
from cmscale.errors import UserError
from cmscale.io.image_files import printable
from cmscale.io.place import Place
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import DatasetManifest, dataset_formats
from cmscale.runs.ownership import TakenOver
from data_prep.making.convert import DEFAULT_ENCODING, ENCODINGS, RECIPE_EXIF, RECIPES
from data_prep.making.documents import PREPARATION, PreparationDocument, PreparationPlan, as_begun, begun_plan
from data_prep.making.preparation import Preparation
from data_prep.making.processes import check_bad, make_missing
from data_prep.making.shards import DatasetSettings, ShardRecord
from data_prep.making.slurm_array import ArrayFailed, ArrayPlacement, ArrayRecord, make_with_array, running_array
from data_prep.sources import open_source, source_usage

DEFAULT_MINUTES = 1440
_UNUSED = {
    "slurm.nodes": "say it with --nodes",
    "slurm.cpus_per_task": "say it with --workers",
    "slurm.gpus_per_node": "tasks of an array use no GPU",
    "slurm.mem_per_gpu": "tasks of an array use no GPU",
    "slurm.batch_python": "an array has no commands of its own",
}
_SKIPPED_NAMED = 20


def prepare(
    preparation: Preparation,
    *,
    workers: int,
    max_bad: int,
    placement: ArrayPlacement | None = None,
    check_source: bool = False,
    report: Callable[[str], None] = print,
) -> DatasetManifest:
    """Makes and publishes the data set, here or with a Slurm array; continues an interrupted one of the same plan.

    Args:
        check_source: Compares what is made already with the source's images by their bytes, not by size and time.

    Raises:
        UserError: the user's mistake; nothing is published.
        ArrayFailed: the Slurm array ended without making all shards.
    """
    try:
        finished = preparation.published(check_source=check_source)
        if finished is not None:
            return _already(preparation, finished, report)
        running = running_array(preparation) if placement else None
        preparation.begin()
        with preparation.exclusive():
            # The command that was waited for may have published meanwhile: then there are no records of its shards.
            finished = preparation.published()
            if finished is not None:
                return _already(preparation, finished, report)
            records = preparation.finished(is_running=running is not None, check_source=check_source)
            if records and not running:
                report(f"continuing: {len(records)} of {preparation.num_shards} shards are finished")
            try:
                records = _make(
                    preparation, records, workers=workers, max_bad=max_bad, placement=placement, running=running
                )
                return preparation.publish(records)
            except TakenOver:
                raise  # what is there is another command's
            except UserError:
                if not records:
                    preparation.abandon()
                raise
    finally:
        preparation.read.close()


def _already(preparation: Preparation, manifest: DatasetManifest, report: Callable[[str], None]) -> DatasetManifest:
    report("already prepared")
    preparation.forget()
    return manifest


def _make(
    preparation: Preparation,
    records: dict[int, ShardRecord],
    *,
    workers: int,
    max_bad: int,
    placement: ArrayPlacement | None,
    running: ArrayRecord | None,
) -> dict[int, ShardRecord]:
    """Makes the shards that have no record. Returns the records of all shards."""
    missing = [n for n in range(preparation.num_shards) if n not in records]
    if placement and missing:
        records = make_with_array(preparation, placement, running=running, max_bad=max_bad)
        check_bad(records.values(), max_bad)
    else:
        make_missing(preparation, records, missing, workers=workers, max_bad=max_bad)
    return records


def command_parser() -> CommandParser:
    """The command line."""
    cores = len(os.sched_getaffinity(0))
    parser = CommandParser(
        prog="prepare.py", description="Turns a source of images into the shards of a data set, in a folder or on S3."
    )
    parser.add("--source", use=USED, required=True, help=f"images to read: {source_usage()}")
    parser.add("--format", use=USED, required=True, choices=dataset_formats(), help="format of the shards")
    parser.add(
        "--out",
        use=USED,
        required=True,
        type=Place,
        help="where the data set is written: a folder or s3://BUCKET/PREFIX",
    )
    number, from_zero = whole_number(1), whole_number(0)
    parser.add(
        "--workers", use=USED, type=number, default=cores, help="worker processes, per node (default: all cores)"
    )
    parser.add("--image-size", use=USED, type=number, default=256, help="side of the images, in pixels (default: 256)")
    parser.add(
        "--preprocess", use=USED, choices=sorted(RECIPES), default="adm", help="crop and resize of ADM (default) or EDM"
    )
    encodings = "; ".join(f"{name}: {meaning}" for name, meaning in ENCODINGS.items())
    parser.add("--encoding", use=USED, choices=sorted(ENCODINGS), help=f"{encodings} (default: {DEFAULT_ENCODING})")
    exif = ", ".join(f"{value} with --preprocess {name}" for name, value in sorted(RECIPE_EXIF.items()))
    parser.add(
        "--exif",
        use=USED,
        choices=("apply", "ignore"),
        help=f"what to do with EXIF orientations (default: as the tools of that name, {exif})",
    )
    parser.add("--samples-per-shard", use=USED, type=number, default=1024, help="images per shard (default: 1024)")
    parser.add(
        "--max-bad", use=USED, type=from_zero, default=0, help="unusable images to skip before giving up (default: 0)"
    )
    parser.add(
        "--check-source",
        use=USED,
        action="store_true",
        help="compare the source with what is made already by the images' bytes (default: by their sizes and times)",
    )
    parser.add("--slurm", use=USED, action="store_true", help="make the shards with a Slurm array, one task per node")
    on_slurm = Use(needs=("slurm",))
    parser.add("--nodes", use=on_slurm, type=number, default=1, help="with --slurm: number of tasks (default: 1)")
    parser.add("--partition", use=on_slurm, help="with --slurm: partition to submit to")
    parser.add(
        "--time",
        use=on_slurm,
        metavar="T",
        help="with --slurm: time limit per task: minutes, HH:MM:SS or D-HH:MM (default: 1440)",
    )
    parser.add(
        "settings",
        use=on_slurm,
        nargs="*",
        metavar="slurm.KEY=VALUE",
        help="with --slurm: what else sbatch is told, by the keys of a config's section slurm",
    )
    return parser


def array_placement(options: argparse.Namespace) -> ArrayPlacement:
    """Where the tasks of `--slurm` run: by the flags, keys `slurm.KEY=VALUE`, SBATCH_* and the site file.

    Raises:
        UserError: a value is not allowed, or says something that an array has no use for.
    """
    for setting in options.settings:
        if reason := _UNUSED.get(setting.partition("=")[0]):
            raise UserError(f"{setting}: {reason}")
        if not setting.startswith("slurm."):
            raise UserError(f"{setting}: only keys of the section slurm can be given here, as slurm.KEY=VALUE")
    slurm = read_launch_settings(options.settings).slurm
    time = options.time or slurm.time or DEFAULT_MINUTES
    try:
        minutes = parse_minutes(time)
        partition = plain_text(options.partition) if options.partition else slurm.partition
    except ValueError as error:
        raise UserError(f"--time or --partition: {error}") from None
    without_gpus = {"mem_per_gpu": None} | ({"gres": None} if slurm.gpus_in_gres() is not None else {})
    return ArrayPlacement(
        nodes=options.nodes,
        cpus=options.workers,
        minutes=minutes,
        partition=partition,
        slurm=slurm.model_copy(update=without_gpus),
    )


def settings_of(options: argparse.Namespace, begun: PreparationPlan | None) -> DatasetSettings:
    """The settings that the options ask for.

    An encoding or EXIF rule that is not given is that of the data set that is begun at `--out`, if there is one: the
    same command continues it, although the defaults of the version that began it may have been others.
    """
    chosen: dict[str, str] = {}
    for name, default in (("encoding", DEFAULT_ENCODING), ("exif", RECIPE_EXIF[options.preprocess])):
        chosen[name] = getattr(options, name) or (getattr(begun.settings, name) if begun else default)
        if begun and not getattr(options, name) and chosen[name] != default:
            print(f"{options.out} was begun with --{name} {chosen[name]}")
    return DatasetSettings.model_validate(
        {
            "format": options.format,
            "image_size": options.image_size,
            "preprocess": options.preprocess,
            "samples_per_shard": options.samples_per_shard,
            **chosen,
        }
    )


def run(arguments: Sequence[str]) -> None:
    """Runs the command; raises its errors."""
    use_site(interactive=False)
    options, _ = command_parser().read(arguments)
    begun = begun_plan(open_storage(options.out))
    source = as_begun(open_source(options.source), begun)
    preparation = Preparation(source, settings_of(options, begun), options.out)
    placement = None
    if options.slurm:
        placement = array_placement(options)
    manifest = prepare(
        preparation,
        workers=options.workers,
        max_bad=options.max_bad,
        placement=placement,
        check_source=options.check_source,
    )
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"
    print(f"{manifest.count} images in {shards}, {manifest.skipped} skipped")
    for line in account(preparation.document(), where=preparation.storage.join(PREPARATION)):
        print(line)
    print(f"fingerprint: {manifest.fingerprint}")
    print(f"dataset: {preparation.storage.url}")


def account(document: PreparationDocument, *, where: str) -> Iterator[str]:
    """Lines that name what was skipped, left out and decided. `where` is the file that names all that is skipped."""
    for key, reason in document.skipped[:_SKIPPED_NAMED]:
        yield f"skipped: {printable(key)}: {reason}"
    if len(document.skipped) > _SKIPPED_NAMED:
        yield f"skipped: and {len(document.skipped) - _SKIPPED_NAMED} more, all named in {where}"
    for reason, (count, names) in document.left_out.items():
        yield f"left out: {reason}: {count} ({', '.join(names)}{', …' if count > len(names) else ''})"
    for decision, count in document.notes.items():
        yield f"{decision}: {count} images"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, 1 if storage or the Slurm array fails, 2 for a user's mistake."""
    return guarded(run, arguments, interrupted="interrupted; run the same command to continue", faults=(ArrayFailed,))


if __name__ == "__main__":
    leave(main())
