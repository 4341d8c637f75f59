"""Lets one command at a time work in a folder of a storage that has no locks: by signs of life that it writes.

Owners are numbered objects, each created where none was. The owner with the highest number works; it changes its object
every few seconds. Whoever sees an owner's object unchanged for `SILENT_SECONDS` creates the next number. Only one can,
and the earlier owner, should it still live, sees the higher number at its next sign of life and ends. No clocks are
compared.
"""

import contextlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cmscale.errors import UserError
from cmscale.io.patience import GivenUp
from cmscale.io.process import is_alive, process_space, start_of
from cmscale.io.protocol import Storage, StorageAway
from cmscale.runs.manifests import Document, read_document

BEAT_SECONDS = 10.0
SILENT_SECONDS = 90.0
"""An owner whose object has not changed for so long is dead: three times the longest pause of a wait for storage."""

_JOIN_SECONDS = 10.0  # for the last sign of life, which must not come after the end
_NAME = re.compile(r"owner-(\d{6})\.json")


class TakenOver(UserError):
    """Raised in a command whose work another one has taken over, as it gave no sign of life for long."""


class Owner(Document):
    """A command that works, or worked, in a folder.

    Attributes:
        beat: Counts signs of life.
        ended: Whether it has ended by itself.
    """

    token: str
    host: str
    process: int
    started: str
    space: str
    beat: int = 0
    ended: bool = False


@contextmanager
def owning(storage: Storage, folder: str, *, what: str) -> Iterator["Ownership"]:
    """Owns the work whose progress is in `folder` of a storage while the block runs.

    A dead owner is taken over: at once if its machine and process number show that it is dead, else after
    `SILENT_SECONDS`.

    Args:
        what: What is owned, for messages.

    Raises:
        UserError: another command owns it; it has touched nothing.
    """
    ownership = Ownership(storage, folder, what=what)
    ownership.claim()
    try:
        yield ownership
    except StorageAway:
        ownership.stop()  # it would only be waited for once more
        raise
    except BaseException:
        ownership.end()
        raise
    ownership.end()


class Ownership:
    """One claim, and its signs of life, in a thread."""

    def __init__(self, storage: Storage, folder: str, *, what: str) -> None:
        self._storage = storage
        self._folder = folder
        self._what = what
        self._own = Owner(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            process=os.getpid(),
            started=start_of(os.getpid()),
            space=process_space(),
        )
        self._number = 0
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self) -> None:
        """Becomes the owner. Raises UserError if somebody else is."""
        while True:
            number = self._newest()
            if number and (alive := self._living(number)) is not None:
                raise self._refusal(alive)
            if self._storage.write_if_absent(self._key(number + 1), self._own.to_bytes()):
                break
        self._number = number + 1
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises TakenOver if another command has taken over."""
        newest = self._newest()
        owner = self._read(newest) if newest else None
        if owner is None or owner.token != self._own.token:
            self._lost = f"process {owner.process} on {owner.host}" if owner else "another command"
        if self._lost is not None:
            raise TakenOver(f"{self._what}: {self._lost} has taken over; this command ends and publishes nothing")

    @property
    def is_lost(self) -> bool:
        """Whether the last sign of life showed that another command has taken over."""
        return self._lost is not None

    def stop(self) -> None:
        """Ends the signs of life."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=_JOIN_SECONDS)

    def end(self) -> None:
        """Ends the signs of life, and shows the next command that it need not wait."""
        self.stop()
        with contextlib.suppress(UserError, OSError):  # the next command then waits for a moment
            key = self._key(self._number)
            if self._storage.read_if_present(key) is None:
                return
            try:
                self._storage.delete(key)
            except UserError:  # deleting is not allowed
                self._storage.write(key, self._own.model_copy(update={"ended": True}).to_bytes())

    def _key(self, number: int) -> str:
        return f"{self._folder}/owner-{number:06d}.json"

    def _newest(self) -> int:
        """The number of the newest owner; what a listing does not show yet is found by reading."""
        prefix = f"{self._folder}/"
        names = (entry.key.removeprefix(prefix) for entry in self._storage.list(f"{prefix}owner-"))
        number = max((int(found[1]) for name in names if (found := _NAME.fullmatch(name))), default=0)
        number = max(number, self._number)
        while self._storage.read_if_present(self._key(number + 1)) is not None:
            number += 1
        return number

    def _read(self, number: int) -> Owner | None:
        raw = self._storage.read_if_present(self._key(number))
        return None if raw is None else read_document(Owner, raw, origin=self._storage.join(self._key(number)))

    def _living(self, number: int) -> Owner | None:
        """The owner of this number if it is alive; None if it is not."""
        first = owner = self._read(number)
        if owner is None or owner.ended:
            return None
        if owner.space == process_space():
            return owner if is_alive(owner.process, owner.started) else None
        print(
            f"{self._what}: process {owner.process} on {owner.host} has begun it; waiting up to {SILENT_SECONDS:g} s "
            "for a sign of life",
            flush=True,
        )
        until = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < until:
            time.sleep(min(2.0, SILENT_SECONDS / 10))
            owner = self._read(number)
            if owner is None or owner.ended:
                return None
            if owner != first:
                return owner
        return None

    def _refusal(self, owner: Owner) -> UserError:
        return UserError(
            f"{self._what}: process {owner.process} on {owner.host} works on it; wait for it to end, or end it "
            f"(a dead one is taken over after {SILENT_SECONDS:g} s)"
        )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self.check()
                self._own = self._own.model_copy(update={"beat": self._own.beat + 1})
                self._storage.write(self._key(self._number), self._own.to_bytes())
            except StorageAway:
                continue  # it has waited; others see no more than this process
            except UserError:
                if self._lost is not None:
                    return
            except OSError:
                continue
            except GivenUp:  # after Ctrl-C
                return
