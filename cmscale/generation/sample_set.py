"""Makes a set of samples on all ranks: part by part, continued after an interruption, complete or not there.

    with opened(place, key=..., machine=..., count=50_000, part_size=64, world=world) as making:
        if making.known is None:
            for part in making.missing()[world.rank :: world.num_ranks]:
                making.commit(part, images)
            making.finish(protocol)

The record of a set is written last, and its parts are removed then. Only one command at a time makes a set.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch

from cmscale.distributed import collectives
from cmscale.distributed.world import World
from cmscale.errors import UserError
from cmscale.generation.parts import Parts
from cmscale.generation.pixel_hash import PixelHash
from cmscale.generation.set_files import npz_key, tars, threads_of, write_npz, write_pictures, write_tar
from cmscale.io import image_tensors
from cmscale.io.counting import Counting
from cmscale.io.place import Place
from cmscale.io.storage import open_parent, stored_entry
from cmscale.runs.ownership import Ownership, owning
from cmscale.runs.results import utc_now
from cmscale.runs.sample_sets import BEGUN, OWNERS, Begun, SampleSet, SetPlace, read_begun, read_record

GRID_IMAGES = 256


@contextmanager
def opened(
    place: SetPlace, *, key: str, machine: Mapping[str, Any], count: int, part_size: int, world: World
) -> Iterator["Making"]:
    """Opens a set for this command alone, while the block runs. Collective.

    Args:
        key: Hash of all that determines the samples, but for the machine. Parts of another key are refused.
        machine: By what else pixels differ in their rounding: parts of another machine are drawn again.

    Raises:
        UserError: another command makes the set, or other samples are there.
    """
    parts = Parts(place.parts, count=count, size=part_size)
    making = Making(place, parts, key=key, machine=machine, count=count, world=world)
    with ExitStack() as stack:

        def begin() -> SampleSet | None:
            making.tidy()
            known = making.find()
            if known is None:
                making.check()  # before anything is written
                making.ownership = stack.enter_context(owning(place.parts, OWNERS, what=place.place))
                known = making.find() or making.begin()
            return known

        making.known = collectives.from_main(collectives.on_main(begin))
        yield making


class Making:
    """A set that is made, on every rank.

    Attributes:
        known: The record, if the set is finished.
    """

    def __init__(
        self, place: SetPlace, parts: Parts, *, key: str, machine: Mapping[str, Any], count: int, world: World
    ) -> None:
        self.place, self.known = place, None
        self.ownership: Ownership | None = None
        self._parts, self._world = parts, world
        self._key, self._machine, self._count = key, dict(machine), count

    def tidy(self) -> None:
        """Removes parts of a finished set: a command left them that was killed after the record. Rank 0 only.

        Another set in that place would be refused because of them.
        """
        parts, record = self.place.parts.read_if_present(BEGUN), self.place.record.read_if_present()
        if parts is None or record is None:
            return
        with suppress(UserError):  # what is damaged is named where it is needed
            finished = read_record(record, origin=self.place.record)
            if read_begun(parts, origin=BEGUN).key == finished.key and self._is_of(finished):
                self._parts.remove()

    def find(self) -> SampleSet | None:
        """The record of the same set, if it is finished. Rank 0 only."""
        raw = self.place.record.read_if_present()
        if raw is None:
            return None
        found = read_record(raw, origin=self.place.record)
        if found.key != self._key:
            if self.place.is_file:
                return None  # an array is replaced by the new one, whole
            raise UserError(f"{self.place.place}: holds other samples; give another place, or remove the folder")
        return found if self._is_of(found) else None

    def check(self) -> Begun | None:
        """Checks that what is there belongs to this set; returns what its parts are of, if there are any. Rank 0 only.

        Raises:
            UserError: other samples, or other files.
        """
        storage = self.place.parts
        raw = storage.read_if_present(BEGUN)
        if raw is None:
            if not self.place.is_file and next(iter(self.place.folder.list()), None) is not None:
                raise UserError(f"{self.place.place}: is not empty; give another place, or empty it")
            return None
        begun = read_begun(raw, origin=storage.join(BEGUN))
        if begun.key != self._key:
            raise UserError(
                f"{storage.url}: parts of other samples, which another command began; let it finish, remove the "
                "folder, or give another place"
            )
        return begun

    def begin(self) -> None:
        """Notes that the set is begun; parts of another machine are removed. Rank 0 only."""
        begun, storage = self.check(), self.place.parts
        if begun is not None and begun.machine == self._machine:
            return
        if begun is not None:
            print(f"{self.place.place}: begun on another kind of machine; drawn anew", file=sys.stderr, flush=True)
            storage.delete_all([entry.key for entry in storage.list("part-")])
        storage.write(BEGUN, Begun(key=self._key, machine=self._machine).to_bytes())

    def missing(self) -> list[range]:
        """The parts that are still to be drawn. Collective."""
        return collectives.from_main(collectives.on_main(self._parts.missing))

    def commit(self, part: range, images: np.ndarray) -> None:
        """Stores a part that this rank has drawn."""
        self._parts.commit(part, images)

    def finish(self, protocol: Mapping[str, Any], *, grid: Place | None = None) -> SampleSet:
        """Writes the set from its parts, with a grid of the first samples, and then its record. Collective."""
        self._check_owner()
        sha256 = self._write_files(grid)
        collectives.barrier()
        self._check_owner()

        def publish() -> SampleSet:
            first = next(self._parts.rows(range(1)))
            record = SampleSet(
                format=self.place.format,
                count=self._count,
                image_size=first.shape[1],
                sha256=sha256,
                key=self._key,
                protocol=dict(protocol),
                machine={**self._machine, "num_ranks": self._world.num_ranks},
                date=utc_now(),
                file_version=self._version(),
            )
            self.place.record.write(record.to_bytes())
            if self.ownership is not None:
                self.ownership.end()
            self._parts.remove()
            return record

        self.known = collectives.from_main(collectives.on_main(publish))
        assert self.known is not None
        return self.known

    def _write_files(self, grid: Place | None) -> str:
        """Writes this rank's share of the files; rank 0 also hashes all pixels. Returns their hash on rank 0."""
        world, rows = self._world, self._parts.rows
        threads = threads_of(world.ranks_per_node)
        if self.place.format == "png":
            for part in self._parts.all()[world.rank :: world.num_ranks]:
                write_pictures(self.place.folder, rows, part, threads=threads)
        if self.place.format == "tar":
            for part in tars(self._count)[world.rank :: world.num_ranks]:
                write_tar(self.place.folder, rows, part, threads=threads)
        if not world.is_main:
            return ""
        pixels = PixelHash()
        with Counting(f"writing {self.place.place}", total=self._count, unit="samples") as counting:
            hashed = self._hashed(pixels, counting)
            if self.place.is_file:
                self._replace_array(hashed)
            else:
                for _ in hashed:
                    pass
        if grid is not None:
            write_grid(np.stack(list(rows(range(min(GRID_IMAGES, self._count))))), grid)
        return pixels.hexdigest()

    def _replace_array(self, images: Iterator[np.ndarray]) -> None:
        storage, name = open_parent(self.place.record)
        storage.delete(name)  # it describes what is there until now
        first = next(self._parts.rows(range(1)))
        shape, dtype = first.shape, str(first.dtype)
        write_npz(self.place.place, images, count=self._count, shape=shape, dtype=dtype, key=self._key)

    def _hashed(self, pixels: PixelHash, counting: Counting) -> Iterator[np.ndarray]:
        for image in self._parts.rows(range(self._count)):
            pixels.add(image if image.dtype != np.uint8 else image.transpose(2, 0, 1))
            yield image
            counting.advance()

    def _is_of(self, record: SampleSet) -> bool:
        """Whether the file beside a record is the one that it describes, and none that replaced it."""
        if not self.place.is_file:
            return True
        storage, name = open_parent(self.place.place)
        path = storage.local_path(name)
        return npz_key(path) == record.key if path is not None else self._version() == record.file_version

    def _version(self) -> str | None:
        """The version of the file of a set in a storage; None on this machine."""
        if not self.place.is_file or not self.place.place.is_remote:
            return None
        storage, name = open_parent(self.place.place)
        entry = stored_entry(storage, name)
        return None if entry is None else entry.version

    def _check_owner(self) -> None:
        """Raises UserError on every rank if another command has taken over. Collective."""
        collectives.on_main(lambda: self.ownership and self.ownership.check())


def as_array(images: torch.Tensor, *, raw: bool) -> np.ndarray:
    """Samples as a set holds them: uint8 [N, H, W, 3], or with `raw` float32 [N, 3, H, W]."""
    if raw:
        return images.cpu().numpy()
    return np.ascontiguousarray(image_tensors.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())


def write_grid(images: np.ndarray, place: Place) -> None:
    """Writes a PNG grid of samples, as a set holds them."""
    tensor = torch.from_numpy(images)
    pixels = image_tensors.to_uint8(tensor) if tensor.is_floating_point() else tensor.permute(0, 3, 1, 2)
    place.write(image_tensors.png_bytes(image_tensors.grid(pixels)))
