"""Verifies a prepared data set, and makes its bad files again from the source.

    python data_prep/verify.py DATASET [--repair] [--source KIND:PATH] [--workers N]

Reads and hashes every file of the manifest once, and lists the bad ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

if __name__ == "__main__":
    from cmscale.commands.ending import end_early_interrupts

    end_early_interrupts()

import hashlib
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cmscale.commands.ending import guarded, leave
from cmscale.commands.parser import CommandParser, whole_number
from cmscale.commands.use import USED, Use
from cmscale.config.site import use_site
from cmscale.data.formats import shard_format
from cmscale.errors import UserError
from cmscale.io.place import Place
from cmscale.io.protocol import ArrivedChanged, Storage
from cmscale.io.storage import open_storage
from cmscale.runs.manifests import DatasetManifest, FileEntry, read_dataset_manifest, read_document
from data_prep.making.documents import PREPARATION, PreparationDocument, as_begun
from data_prep.making.progress import ProgressCounter
from data_prep.making.shards import DatasetSettings, TooManyBad, build_shard
from data_prep.sources import SourceReader, open_source, source_usage


def fault_of(storage: Storage, entry: FileEntry) -> str | None:
    """What is wrong with a stored file; None if nothing is."""
    try:
        data = storage.read(entry.name)
    except FileNotFoundError:
        return "missing"
    except ArrivedChanged as error:
        return str(error)
    except ConnectionError:
        raise
    except OSError as error:  # a bad place of the disk, or a folder there; the other files are checked, too
        return f"can't be read ({error.strerror or error})"
    if len(data) != entry.size:
        return f"{len(data)} bytes, expected {entry.size}"
    found = hashlib.sha256(data).hexdigest()
    return None if found == entry.sha256 else f"SHA-256 {found}, expected {entry.sha256}"


def verify(storage: Storage, manifest: DatasetManifest, *, workers: int) -> dict[str, str]:
    """Checks every file of the manifest. Returns the faults by file name, in the manifest's order."""
    entries = [*manifest.files, *manifest.shards]
    with (
        ProgressCounter("verifying", total=len(entries), unit="files") as counter,
        ThreadPoolExecutor(workers) as threads,
    ):
        faults = []
        for fault in threads.map(lambda entry: fault_of(storage, entry), entries):
            faults.append(fault)
            counter.tick()
            counter.show()
    return {entry.name: fault for entry, fault in zip(entries, faults, strict=True) if fault}


def repair(storage: Storage, manifest: DatasetManifest, bad: Sequence[str], *, source: str | None) -> None:
    """Makes bad shards, and a bad index, again from the source, if they come out exactly as published.

    Raises:
        UserError: the source's images or the encoders' versions have changed; the file is not replaced then.
    """
    document = _preparation(storage, manifest)
    opened = as_begun(open_source(source or document.plan.source), document.plan)
    if (len(opened.keys), opened.digest()) != (document.plan.keys, document.plan.keys_sha256):
        raise UserError(f"{opened.name}: not the images that {storage.url} was made from; nothing is repaired")
    read = SourceReader(opened)
    try:
        _make_again(storage, manifest, bad, settings=document.plan.settings, keys=opened.keys, read=read)
    finally:
        read.close()


def _make_again(
    storage: Storage,
    manifest: DatasetManifest,
    bad: Sequence[str],
    *,
    settings: DatasetSettings,
    keys: list[str],
    read: SourceReader,
) -> None:
    format = shard_format(settings.format)
    entries = {entry.name: entry for entry in manifest.shards}
    needs_spans = format.index_name in bad and format.index_needs_spans
    size = settings.samples_per_shard
    spans = []
    with tempfile.TemporaryDirectory(prefix="cmscale-repair-") as folder:
        for number in range(-(-len(keys) // size)):
            name = format.shard_name(number)
            if name not in entries or not (name in bad or needs_spans):
                continue
            differs = (
                f"{storage.join(name)}: made again, it differs from what was published (other images, or another "
                "version of an encoder); it is not replaced; prepare the data set again"
            )
            try:
                record, path = build_shard(
                    keys[number * size : (number + 1) * size],
                    read,
                    settings=settings,
                    number=number,
                    folder=Path(folder),
                    max_bad=manifest.skipped,
                )
            except TooManyBad as error:
                raise UserError(f"{differs}; unusable: {'; '.join(map(': '.join, error.bad[:5]))}") from None
            if record.entry != entries[name]:
                raise UserError(differs)
            spans.extend(record.spans)
            if name in bad:
                storage.upload(name, path)
                print(f"repaired: {name}")
            path.unlink()
    if format.index_name in bad:
        _write_index(storage, manifest, format.index_name, format.index_bytes(manifest.shards, spans))


def _write_index(storage: Storage, manifest: DatasetManifest, name: str, data: bytes) -> None:
    (published,) = (entry.sha256 for entry in manifest.files if entry.name == name)
    if hashlib.sha256(data).hexdigest() != published:
        raise UserError(f"{storage.join(name)}: made again, it differs from what was published; prepare again")
    storage.write(name, data)
    print(f"repaired: {name}")


def _preparation(storage: Storage, manifest: DatasetManifest) -> PreparationDocument:
    entry = next((entry for entry in manifest.files if entry.name == PREPARATION), None)
    if entry is None or fault_of(storage, entry):
        raise UserError(
            f"{storage.join(PREPARATION)}: missing or damaged, so nothing can be repaired; prepare the data set again"
        )
    return read_document(PreparationDocument, storage.read(PREPARATION), origin=storage.join(PREPARATION))


def command_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="verify.py", description="Verifies the files of a prepared data set.")
    parser.add("dataset", use=USED, type=Place, help="the data set: a folder or s3://BUCKET/PREFIX")
    parser.add("--repair", use=USED, action="store_true", help="make bad files again from the source")
    parser.add("--source", use=Use(needs=("repair",)), help=f"the source, if it has moved: {source_usage()}")
    parser.add("--workers", use=USED, type=whole_number(1), default=4, help="files to read at a time (default: 4)")
    parser.add("--json", use=Use(excludes=("repair",)), action="store_true", help="print JSON")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Runs the command; raises its errors. Returns 1 if files are bad, else 0."""
    use_site(interactive=False)
    options, _ = command_parser().read(arguments)
    storage = open_storage(options.dataset)
    manifest = read_dataset_manifest(storage)
    bad = verify(storage, manifest, workers=options.workers)
    if options.json:
        files = len(manifest.shards) + len(manifest.files)
        print(json.dumps({"files": files, "images": manifest.count, "fingerprint": manifest.fingerprint, "bad": bad}))
        return 1 if bad else 0
    for name, fault in bad.items():
        print(f"bad: {name}: {fault}")
    if bad and options.repair:
        repair(storage, manifest, list(bad), source=options.source)
        bad = verify(storage, manifest, workers=options.workers)
    if bad:
        print(f"{len(bad)} of {len(manifest.shards) + len(manifest.files)} files are bad; --repair makes them again")
        return 1
    intact = "the only shard is" if len(manifest.shards) == 1 else f"all {len(manifest.shards)} shards are"
    print(f"{intact} intact: {manifest.count} images, {manifest.fingerprint}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, 1 for bad files or storage that fails, 2 for a user's mistake."""
    return guarded(run, arguments)


if __name__ == "__main__":
    leave(main())
