"""Reads pickles without executing anything in them: a name stays a name, and a call stays a call that is not made.

Python's own unpickler calls what a file names. An allow-list does not help where an allowed function trusts its
arguments, as `numpy.ndarray` does: with the type `object` it follows pointers from the file. Here the opcodes are
interpreted, and what a pickle would construct is returned as data; the readers of formats interpret the few calls that
they know, and check every argument.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_MAX_OPCODES = 2_000_000  # the pickle of a large network has some 200,000
_LONGEST_LINE = 1 << 20
_SCALARS = (str, bytes, int, float, bool, type(None))


class PickleError(ValueError):
    """Raised for a pickle that is damaged, or holds something else than its reader takes."""


class ForbiddenName(PickleError):
    """Raised for a pickle that names what its reader does not allow."""


@dataclass(frozen=True)
class Name:
    """A module's attribute that a pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """A call, or the construction of an object, that a pickle asks for and that is not made.

    Attributes:
        function: What would be called.
        arguments: With what.
        state: The state that the object would get; None for none.
        items: What would be set by key in it, or added to it by position.
    """

    function: Any
    arguments: tuple[Any, ...]
    state: Any = field(default=None, repr=False)
    items: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The dotted name of the function."""
        return str(self.function) if isinstance(self.function, Name) else type(self.function).__name__


@dataclass(frozen=True)
class Persistent:
    """An object outside the pickle, by its id."""

    id: Any


_MARK = object()


def read_pickle(file: BinaryIO, *, size: int, allows: Callable[[Name], bool] | None = None) -> Any:
    """Reads one pickle from a file's position, and leaves the file behind it.

    Returns:
        Numbers, text, bytes, None, lists, tuples, sets and dicts as they are; everything else as `Name`, `Call` or
        `Persistent`.

    Args:
        size: Bytes of the whole file: nothing claims to be larger.
        allows: Whether a name may occur in the pickle; None allows any.

    Raises:
        PickleError: the pickle is damaged, names what is not allowed, or is larger than any that makes sense.
    """
    machine = _Machine(allows)
    bounded: Any = _Bounded(file, size)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):
            if count > _MAX_OPCODES:
                raise PickleError(f"has more than {_MAX_OPCODES} operations")
            if opcode.name == "STOP":
                return machine.pop()
            machine.execute(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise PickleError(f"the pickle is damaged: {str(error)[:200]}") from error
    raise PickleError("the pickle has no end")


class _Bounded:
    """A file as pickletools reads it, which never allocates more than the file holds."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._size - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_LINE)

    def tell(self) -> int:
        return self._file.tell()


class _Machine:
    """The stack and the memo of an unpickler."""

    def __init__(self, allows: Callable[[Name], bool] | None) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.allows = allows

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("the pickle is damaged: its stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        """Removes what was pushed after the last mark, and the mark."""
        found: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return found[::-1]
            found.append(value)
        raise PickleError("the pickle is damaged: it lacks a mark")

    def execute(self, name: str, argument: Any) -> None:
        """Executes an opcode."""
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(_MARK)
            case "POP":
                if not self.stack:
                    raise PickleError("the pickle is damaged: its stack is empty")
                self.stack.pop()
            case "POP_MARK":
                self.since_mark()
            case "DUP":
                push(self.top())
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "PERSID":
                push(Persistent(argument))
            case "BINPERSID":
                push(Persistent(self.pop()))
            case _ if name in _VALUES:
                push(bytes(argument) if isinstance(argument, bytearray) else argument)
            case _ if name in _CONTAINERS:
                self._container(name)
            case _:
                self._call(name, argument)

    def _container(self, name: str) -> None:
        push = self.stack.append
        match name:
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_SET":
                push({"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
            case "LIST":
                push(self.since_mark())
            case "TUPLE":
                push(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
            case "DICT":
                push(dict(_pairs(self.since_mark())))
            case "FROZENSET":
                push(frozenset(_scalar(value) for value in self.since_mark()))
            case "APPEND" | "APPENDS":
                added = [self.pop()] if name == "APPEND" else self.since_mark()
                self._add(added)
            case "ADDITEMS":
                added = self.since_mark()
                self._add([_scalar(value) for value in added])
            case "SETITEM" | "SETITEMS":
                if name == "SETITEM":
                    value = self.pop()
                    flat = [self.pop(), value]
                else:
                    flat = self.since_mark()
                target = self.top()
                (target.items if isinstance(target, Call) else _of(dict, target)).update(_pairs(flat))

    def _add(self, values: list[Any]) -> None:
        match self.top():
            case list() as target:
                target.extend(values)
            case set() as target:
                target.update(values)
            case Call() as target:
                target.items.update((len(target.items) + number, value) for number, value in enumerate(values))
            case target:
                _of(list, target)

    def _call(self, name: str, argument: Any) -> None:
        push = self.stack.append
        match name:
            case "GLOBAL":
                push(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute = _of(str, self.pop())
                push(self._named(_of(str, self.pop()), attribute))
            case "REDUCE" | "NEWOBJ":
                arguments = _of(tuple, self.pop())
                push(_call(self.pop(), arguments))
            case "NEWOBJ_EX":
                keywords = _of(dict, self.pop())
                arguments = _of(tuple, self.pop())
                call = _call(self.pop(), arguments)
                call.items.update(keywords)
                push(call)
            case "INST":
                arguments = tuple(self.since_mark())
                push(_call(self._named(*argument.split(" ", 1)), arguments))
            case "OBJ":
                function, *rest = self.since_mark()
                push(_call(function, tuple(rest)))
            case "BUILD":
                state = self.pop()
                _of(Call, self.top()).state = state
            case _:
                raise PickleError(f"the pickle uses {name}, which no reader here knows")

    def _named(self, module: str, name: str) -> Name:
        found = Name(module, name)
        if self.allows is not None and not self.allows(found):
            raise ForbiddenName(f"it names {str(found)[:100]}, which could run code")
        return found


_VALUES = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_CONTAINERS = frozenset(
    {"EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "DICT"}
    | {"FROZENSET", "APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS"}
)


def _call(function: Any, arguments: tuple[Any, ...]) -> Call:
    return Call(_of(Name, function), arguments)


def _pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(flat) % 2:
        raise PickleError("the pickle is damaged: a key has no value")
    return ((_scalar(key), value) for key, value in zip(flat[::2], flat[1::2], strict=True))


def _scalar(value: Any) -> Any:
    """A key of a dict, or an element of a set. Python hashes nested tuples recursively, without a limit."""
    if not isinstance(value, (*_SCALARS, Name)):
        raise PickleError(f"the pickle has a {type(value).__name__} as a key")
    return value


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise PickleError(f"the pickle is damaged: {type(value).__name__} where {kind.__name__} is needed")
    return value


def plain(value: Any) -> Any:
    """A dict where a pickle constructs `collections.OrderedDict` or another mapping that is known by its name."""
    if not isinstance(value, Call) or value.name not in _MAPPINGS:
        return value
    given = value.arguments[0] if len(value.arguments) == 1 else ()
    pairs = given if isinstance(given, list) else ()  # Python 2 gives [[key, value], ...]
    flat = [part for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 for part in pair]
    return dict(_pairs(flat)) | value.items


_MAPPINGS = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict"})
