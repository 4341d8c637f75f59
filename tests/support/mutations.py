"""Damages files at random, as disks, networks and ill will do: bytes of any file, values of JSON and YAML, arrays."""

import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WEIRD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 1e308, float("nan"), float("inf"), "", "x", "x" * 100_000, "\ud800",
    "../../etc/passwd", "s3://", [], [[]], {}, {"x": 1}, [1, "a", None], "2024-01-01", "\x1b[2J\r\n",
)  # fmt: skip
WEIRD_TEXT = (
    "2024-13-45", "2024-01-01", "!!int abc", "!!float x", "!!timestamp x", "!!binary '*'", "!!python/name:os.system",
    "9" * 5000, "0x" + "f" * 5000, "[" * 1100, "{" * 50, "~nosuchuser/x", "0100", "1:00", "*missing", "&a [*a, *a]",
    "'",
    "null", "-0", "1e400", ".nan", "[1, [2, [3]]]", "? [a]", "<<: [1]", "\t", "x: y: z", "\x00", "\x1b[31m", "on", "|",
    "[&a [1,1,1], &b [*a,*a,*a], &c [*b,*b,*b], &d [*c,*c,*c], &e [*d,*d,*d], &f [*e,*e,*e], &g [*f,*f,*f]]",
)  # fmt: skip


def mutated(name: str, content: bytes, chance: random.Random) -> bytes:
    """The content of a file of this name, damaged in one of the ways that fit it."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [_bytes]
    if name.endswith(".json"):
        ways += [_json] * 2
    if name.endswith((".yaml", ".jsonl")):
        ways += [_line] * 3
    if name.endswith(".safetensors"):
        ways += [_header] * 3
    if name.endswith(".npz"):
        ways += [_member] * 3 + [_flags]
    if name.endswith((".zip", ".pt")):
        ways += [_flags]
    if name.endswith(".npy"):
        ways += [lambda content, chance: _saved(_array(chance))]
    if name.endswith((".npz", ".npy", ".safetensors", ".pkl", ".pt", ".png", ".tar", ".mdb")):
        ways += [_number]
    return chance.choice(ways)(content, chance)


def _bytes(content: bytes, chance: random.Random) -> bytes:
    """Flipped, cut, emptied, repeated, zeroed, overwritten or inserted bytes; half of them near the start."""
    changed = bytearray(content)
    size = len(changed)
    at = chance.randrange(size + 1) if chance.random() < 0.5 else min(size, int(chance.expovariate(1 / 200)))
    length = min(size - at, chance.choice((1, 2, 4, 8, 64, 512)))
    match chance.randrange(8):
        case 0:
            for _ in range(chance.choice((1, 3, 30)) if size else 0):
                changed[chance.randrange(size)] ^= 1 << chance.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            changed = bytearray(
                chance.choice((b"", b"\0", b"PK\x05\x06" + bytes(18), b"\x80\x04.", b"{}", b"null", b"\n"))
            )
        case 3:
            changed[at : at + length] = changed[at : at + length] * 2
        case 4:
            changed[at : at + length] = bytes(length)
        case 5:
            changed[at : at + length] = b"\xff" * length
        case 6:
            changed[at:at] = chance.randbytes(length)
        case 7:
            changed[at : at + length] = chance.randbytes(length)
    return bytes(changed)


def _number(content: bytes, chance: random.Random) -> bytes:
    """A number in decimal or binary, replaced by another one: sizes, counts, offsets."""
    head = content[:4096]
    found = [match.span() for match in re.finditer(rb"\d+", head)]
    if found and chance.random() < 0.6:
        begin, end = chance.choice(found)
        other = chance.choice((b"0", b"-1", b"1000000000", b"9" * 30, b"1.5", b"1e9"))
        return (
            content[:begin]
            + (other if chance.random() < 0.5 else other[: end - begin].rjust(end - begin))
            + content[end:]
        )
    width = chance.choice((2, 4, 8))
    at = chance.randrange(max(1, len(content) - width))
    value = chance.choice((0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width) - 1, 2**20, 2**31 - 1)) % 2 ** (8 * width)
    return content[:at] + value.to_bytes(width, chance.choice(("little", "big"))) + content[at + width :]


def _json(content: bytes, chance: random.Random) -> bytes:
    """One value anywhere in a document, replaced, removed or renamed."""
    try:
        tree = json.loads(content)
    except ValueError:
        return _bytes(content, chance)
    if chance.random() < 0.1:
        return b"[" * 100_000 if chance.random() < 0.5 else json.dumps(chance.choice(WEIRD_VALUES)).encode()
    holder = tree
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return json.dumps(tree).encode()
        key = chance.choice(keys)
        child = holder[key]
        if isinstance(child, dict | list) and child and chance.random() < 0.7:
            holder = child
            continue
        match chance.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[chance.choice(("", "x" * 1000, "\ud800", f"{key}_"))] = holder.pop(key)
            case _:
                holder[key] = chance.choice(WEIRD_VALUES)
        return json.dumps(tree).encode()


def _header(content: bytes, chance: random.Random) -> bytes:
    """The header of safetensors with another value somewhere, or another length."""
    length = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + length], content[8 + length :]
    try:
        json.loads(header)
    except ValueError:
        return _bytes(content, chance)
    changed = _json(header, chance)
    stated = chance.choice((len(changed),) * 6 + (0, len(changed) + 1, 2**40, 2**64 - 1))
    return stated.to_bytes(8, "little") + changed + tensors


def _line(content: bytes, chance: random.Random) -> bytes:
    """One line of text with another value, or another line."""
    lines = content.decode().splitlines()
    if not lines:
        return content
    at = chance.randrange(len(lines))
    key, colon, value = lines[at].partition(": ")
    text = chance.choice(WEIRD_TEXT)
    if colon and chance.random() < 0.8:
        parts = re.split(r"(, )", value)
        parts[chance.randrange(len(parts))] = text
        lines[at] = f"{key}: {''.join(parts)}" if chance.random() < 0.5 else f"{key}: {text}"
    else:
        lines[at] = text
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _array(chance: random.Random) -> np.ndarray:
    """An array that no reader asked for."""
    shapes = ((), (0,), (3,), (2, 2), (4, 8, 8, 3), (4, 3, 8, 8), (1, 0, 8, 3), (0, 8, 8, 3), (17, 17), (1,) * 20)
    shape = chance.choice(shapes)
    kinds = ("u1", "f4", "f8", "f2", "i8", "U3", "S3", "?", "c16", "M8[s]", "O", [("a", "i4")], ">f8", "f16")
    return np.full(shape, 1).astype(chance.choice(kinds), order=chance.choice(("C", "F")))


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _member(content: bytes, chance: random.Random) -> bytes:
    """An `.npz` with one member damaged, replaced, removed or repeated, compressed or not."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice(list(members))
    match chance.randrange(4):
        case 0:
            del members[name]
        case 1:
            members[name] = _saved(_array(chance))
        case 2:
            members[name] = _number(members[name], chance)
        case 3:
            members[name] = _bytes(members[name], chance)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for each, data in members.items():
            archive.writestr(each, data)
    return file.getvalue()


def _flags(content: bytes, chance: random.Random) -> bytes:
    """An archive that lists a member as encrypted, compressed otherwise, longer, or of another checksum."""
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    if not entries:
        return _bytes(content, chance)
    changed = bytearray(content)
    at = chance.choice(entries)
    field, values = chance.choice(
        (
            (8, b"\x01\x00"),
            (8, b"\x00\x08"),
            (10, b"\x63\x00"),
            (10, b"\x0c\x00"),
            (16, b"\0\0\0\0"),
            (24, b"\0\0\0\x7f"),
        )
    )
    changed[at + field : at + field + len(values)] = values
    return bytes(changed)


def replaced(path: Path, chance: random.Random) -> str | None:
    """Puts something else in the place of a file; None if it leaves the file alone."""
    what = chance.choice((None,) * 12 + ("nothing", "a folder", "/dev/zero", "/dev/null", "a broken link", "a loop"))
    if what is None:
        return None
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what.startswith("/dev"):
        path.symlink_to(what)
    elif what == "a broken link":
        path.symlink_to("absent")
    elif what == "a loop":
        path.symlink_to(path.name)
    return what
