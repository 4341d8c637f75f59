"""Owns the command that checks a prepared data set, and writes its bad shards again from the source.

    python data_prep/verify.py DATASET [--repair] [--source KIND:PATH] [--workers N]

Every file of the manifest is read once and hashed; bad ones are named.
"""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from the checkout

from cmscale.data.formats import mds, webdataset
from cmscale.errors import UserError
from cmscale.io.storage import ArrivedChanged, Storage, open_storage
from cmscale.runs.manifests import DatasetManifest, FileEntry, read_dataset_manifest, read_document
from data_prep.job import PREPARATION, Preparation
from data_prep.progress import Ticker
from data_prep.shards import Settings, build_shard, index_file, shard_name
from data_prep.sources import Reader, open_source


def fault_of(storage: Storage, entry: FileEntry) -> str | None:
    """What is wrong with a stored file, or None."""
    try:
        data = storage.read(entry.name)
    except FileNotFoundError:
        return "missing"
    except ArrivedChanged as error:
        return str(error)
    if len(data) != entry.size:
        return f"{len(data)} bytes, expected {entry.size}"
    found = hashlib.sha256(data).hexdigest()
    return None if found == entry.sha256 else f"SHA-256 {found}, expected {entry.sha256}"


def verify(storage: Storage, manifest: DatasetManifest, *, workers: int) -> dict[str, str]:
    """Checks every file of the manifest. Returns what is wrong, by name, in the manifest's order."""
    entries = [*manifest.files, *manifest.shards]
    with Ticker(total=len(entries), what="files") as ticker, ThreadPoolExecutor(workers) as threads:
        faults = []
        for fault in threads.map(lambda entry: fault_of(storage, entry), entries):
            faults.append(fault)
            ticker.tick()
            ticker.show()
    return {entry.name: fault for entry, fault in zip(entries, faults, strict=True) if fault}


def repair(storage: Storage, manifest: DatasetManifest, bad: Sequence[str], *, source: str | None) -> None:
    """Writes bad shards, and a bad index, again from the source; only if they come out as published.

    Raises:
        UserError: the source or the encoders' versions are not what they were: nothing is replaced then.
    """
    preparation = _preparation(storage, manifest)
    opened = open_source(source or preparation.plan.source)
    if (len(opened.keys), opened.digest()) != (preparation.plan.keys, preparation.plan.keys_sha256):
        raise UserError(f"{opened.name}: not the images that {storage.url} is made of; nothing is repaired")
    read = Reader(opened)
    try:
        _make_again(storage, manifest, bad, settings=preparation.plan.settings, keys=opened.keys, read=read)
    finally:
        read.close()


def _make_again(
    storage: Storage,
    manifest: DatasetManifest,
    bad: Sequence[str],
    *,
    settings: Settings,
    keys: list[str],
    read: Reader,
) -> None:
    entries = {entry.name: entry for entry in (*manifest.files, *manifest.shards)}
    bad_index = next((name for name in bad if name in (mds.INDEX, webdataset.INDEX)), None)
    needs_spans = bad_index == webdataset.INDEX
    size = settings.samples_per_shard
    records = []
    with tempfile.TemporaryDirectory(prefix="cmscale-repair-") as folder:
        for number in range(-(-len(keys) // size)):
            name = shard_name(settings, number)
            if name not in entries or not (name in bad or needs_spans):
                continue
            record, path = build_shard(
                keys[number * size : (number + 1) * size],
                read,
                settings=settings,
                number=number,
                folder=Path(folder),
                max_bad=manifest.skipped,
            )
            if record.entry != entries[name]:
                raise UserError(
                    f"{storage.join(name)}: made again it differs from what was published (other images, or "
                    f"another version of an encoder); it is not replaced: prepare the data set anew"
                )
            records.append(record)
            if name in bad:
                storage.upload(name, path)
                print(f"repaired: {name}")
            path.unlink()
    if bad_index:
        data = index_file(settings, records)[1] if needs_spans else mds.shard_index(manifest.shards)
        if hashlib.sha256(data).hexdigest() != entries[bad_index].sha256:
            raise UserError(f"{storage.join(bad_index)}: can't be made again as it was; prepare anew")
        storage.write(bad_index, data)
        print(f"repaired: {bad_index}")


def _preparation(storage: Storage, manifest: DatasetManifest) -> Preparation:
    entry = next((entry for entry in manifest.files if entry.name == PREPARATION), None)
    if entry is None or fault_of(storage, entry):
        raise UserError(f"{storage.join(PREPARATION)}: missing or damaged, so nothing is repaired; prepare anew")
    return read_document(Preparation, storage.read(PREPARATION), origin=storage.join(PREPARATION))


def run(arguments: Sequence[str] | None = None) -> int:
    """The command, with its exceptions."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Checks a prepared data set.")
    parser.add_argument("dataset", help="a folder or s3://BUCKET/PREFIX")
    parser.add_argument("--repair", action="store_true", help="write bad shards again from the source")
    parser.add_argument("--source", help="where the source is now, if it has moved")
    parser.add_argument("--workers", type=int, default=4, help="files read at a time")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: {options.workers} must be at least 1")
    storage = open_storage(options.dataset)
    manifest = read_dataset_manifest(storage)
    bad = verify(storage, manifest, workers=options.workers)
    for name, fault in bad.items():
        print(f"bad: {name}: {fault}")
    if bad and options.repair:
        repair(storage, manifest, list(bad), source=options.source)
        bad = verify(storage, manifest, workers=options.workers)
    if bad:
        print(f"{len(bad)} of {len(manifest.shards) + len(manifest.files)} files are bad (see --repair)")
        return 1
    print(f"all {len(manifest.shards)} shards as published: {manifest.count} images, {manifest.fingerprint}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0; 1 for bad files or a storage that fails; 2 with one line for a user's mistake."""
    try:
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ConnectionError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
