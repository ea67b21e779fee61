"""The plain values in a pickle, without unpickling it: nothing that it names is imported, called or built.

A pickle is a program for a machine with a stack. This is another machine for the same programs: numbers, texts, lists
and dictionaries come out as they are, and whatever a pickle would import, call or build is written down as `Inert`.
"""

import pickletools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MOST_BYTES, MOST_STEPS, DEEPEST = 2**24, 10**6, 64
"""Of a pickle: its bytes, the operations that are followed, and how deep its lists and dictionaries are nested."""

_OURS = ("transformers", "trl", "accelerate")  # whose enumerations are read as their values


class PickleError(ValueError):
    """These bytes are no pickle of plain values and of records of them."""


@dataclass(eq=False)
class Inert:
    """What a pickle names, calls or builds, written down and never done.

    Attributes:
        name: `module.attribute` that would be imported.
        arguments: that it would be called with.
        state: that it would be given afterwards.
        items: that would be put into it, where it is a dictionary of a kind.
    """

    name: str
    arguments: list[Any] = field(default_factory=list)
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


PERSISTENT = "persistent"
"""Names what a pickle leaves to whoever reads it, such as the storage of a tensor: its arguments are what it says."""


_MARK = object()
_SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SCALARS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": list, "EMPTY_SET": list, "EMPTY_DICT": dict}
_SEQUENCES = {"LIST", "TUPLE", "FROZENSET"}  # of everything above the mark


def read_pickle(content: bytes, most_bytes: int = MOST_BYTES, most_steps: int = MOST_STEPS) -> Any:
    """What a pickle describes: plain values as they are, tuples and sets as lists, anything else as `Inert`.

    Args:
        content: a pickle of any protocol.
        most_bytes: that it may have.
        most_steps: operations that it may have.

    Returns:
        A value that may share parts with itself; `plain` makes values of a bounded size of it.

    Raises:
        PickleError: it is damaged, too large, or needs what is outside of it.
    """
    if len(content) > most_bytes:
        raise PickleError(f"it has more than {most_bytes} bytes")
    machine = _Machine()
    try:
        for name, argument, _ in operations(content, most_steps):
            if name == "STOP":
                return machine.pop()
            machine.step(name, argument)
    except PickleError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PickleError("its operations do not fit together") from error
    raise PickleError("it does not end")


def operations(content: bytes, most_steps: int = MOST_STEPS) -> Iterator[tuple[str, Any, int]]:
    """The operations of the pickle that bytes begin with: name, argument, and where it is.

    Raises:
        PickleError: it is cut off, too long, or no pickle.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of texts with odd escapes
            for count, (operation, argument, place) in enumerate(pickletools.genops(content)):
                if count > most_steps:
                    raise PickleError(f"it has more than {most_steps} operations")
                yield operation.name, argument, place or 0
    except (ValueError, OverflowError) as error:
        raise error if isinstance(error, PickleError) else PickleError(str(error).partition("\n")[0]) from error


class _Machine:
    """A stack and a memory, as a pickle expects them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("its operations do not fit together")
        return value

    def above_mark(self) -> list[Any]:
        """Take what lies above the topmost mark, and the mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise PickleError("its operations do not fit together")
        found, self.stack[place:] = self.stack[place + 1 :], []
        return found

    def step(self, name: str, argument: Any) -> None:
        """Do one operation."""
        if name in _SINGLE:
            self.stack.append(_SINGLE[name])
        elif name in _SCALARS:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _SEQUENCES:
            self.stack.append(self.above_mark())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            self.stack.append([self.pop() for _ in range(size)][::-1])
        elif name in ("APPEND", "APPENDS", "ADDITEMS", "DICT", "SETITEM", "SETITEMS"):
            self._fill(name)
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD"):
            self._describe(name, argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "POP":
            self.stack.pop()
        elif name == "POP_MARK":
            self.above_mark()
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memory[argument])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memory[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = self.stack[-1]
        elif name == "BINPERSID":
            self.stack.append(Inert(PERSISTENT, [self.pop()]))
        elif name == "PERSID":
            self.stack.append(Inert(PERSISTENT, [argument]))
        else:  # extension codes and buffers are kept outside of the pickle
            raise PickleError(f"it needs what is outside of it ({name})")

    def _fill(self, name: str) -> None:
        """Put items into the list or dictionary below them; what is no dictionary or list stays as it is."""
        if name in ("SETITEM", "APPEND"):
            items = [self.pop() for _ in range(2 if name == "SETITEM" else 1)][::-1]
        else:
            items = self.above_mark()
        if name == "DICT":
            self.stack.append({})
        into = self.stack[-1]
        if name in ("APPEND", "APPENDS", "ADDITEMS"):
            if isinstance(into, list):
                into.extend(items)
            return
        if isinstance(into, Inert):
            into = into.items
        if isinstance(into, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # the hash of an Inert is that of its place in memory; that of anything else may take for ever
                if isinstance(key, str | int | float | bool | None | Inert):
                    into[key] = value

    def _describe(self, name: str, argument: Any) -> None:
        """Write down what would be imported, called or built."""
        if name == "GLOBAL":
            self.stack.append(Inert(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            self.stack.append(Inert(f"{module}.{attribute}" if isinstance(module, str) else "unknown"))
        elif name == "BUILD":
            state, built = self.pop(), self.stack[-1]
            if isinstance(built, Inert):
                built.state = state
        else:
            if name == "INST":
                callee, arguments = Inert(str(argument).replace(" ", ".")), self.above_mark()
            elif name == "OBJ":
                callee, *arguments = self.above_mark()
            else:
                if name == "NEWOBJ_EX":
                    self.pop()
                arguments, callee = self.pop(), self.pop()
            named = callee.name if isinstance(callee, Inert) else "unknown"
            self.stack.append(Inert(named, arguments if isinstance(arguments, list) else []))


def plain(value: Any) -> Any:
    """Plain values of what `read_pickle` returns.

    Args:
        value: any part of it.

    Returns:
        None, a truth value, a number, a text, or lists and dictionaries of these. A member of an enumeration of the
        trainer's libraries is its value, and a record its state; of anything else the `Inert` that names it stays.

    Raises:
        PickleError: it is nested too deeply, or shares parts so often that it would never end.
    """
    left = MOST_STEPS

    def walk(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > DEEPEST or left < 0:
            raise PickleError("it is nested too deeply")
        if isinstance(value, dict):
            return {key: walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, depth + 1) for item in value]
        if isinstance(value, Inert):
            if isinstance(value.state, dict):
                return walk(value.state, depth + 1)
            is_member = value.state is None and len(value.arguments) == 1 and value.name.partition(".")[0] in _OURS
            if is_member and isinstance(value.arguments[0], str | int | float):
                return walk(value.arguments[0], depth + 1)
            return Inert(value.name)
        if isinstance(value, str):
            return value.encode("utf-8", "replace").decode()  # a half of a surrogate pair cannot be printed
        if isinstance(value, bytes | bytearray) or (isinstance(value, int) and abs(value) >= 2**63):
            return Inert(type(value).__name__)
        return value

    return walk(value, 0)
