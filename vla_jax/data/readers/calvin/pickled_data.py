"""Contents of pickles without `pickle`: nothing that a file names is imported, called or built.

The instructions of the pickle are interpreted on plain lists, dicts, texts and numbers. Of the
things that a pickle may refer to by name, only NumPy's arrays, scalars and types are known, and
they become records of this file; any other name is refused.
"""

import math
import pickletools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): "array",  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): "array",  # NumPy 2
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
}
DTYPE = re.compile(r"b1|[iu][1248]|f[248]|[US]\d{1,6}|O8?")


class PickledArray:
    """NumPy array in a pickle, as its description and bytes; filled after it is made."""

    def __init__(self) -> None:
        """Makes an array without content."""
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.int8)
        self.data: Any = b""

    def values(self) -> list[Any]:
        """Returns the elements in row order, of the first axis if there are several.

        Raises:
          ValueError: the bytes do not fit the description.
        """
        size = math.prod(self.shape)
        if isinstance(self.data, list):
            if not self.dtype.hasobject or len(self.data) != size or len(self.shape) > 1:
                raise ValueError("an array of objects must be a list")
            return self.data
        if self.dtype.hasobject or len(self.data) != size * self.dtype.itemsize:
            raise ValueError(f"an array must have {size} elements of {self.dtype}")
        return np.frombuffer(self.data, self.dtype).reshape(self.shape).tolist()


class _Type:
    """NumPy type in a pickle; its byte order is given after it is made."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "|"

    def dtype(self) -> np.dtype:
        return np.dtype(object) if self.code[0] == "O" else np.dtype(self.order + self.code)


class _Name(NamedTuple):
    role: str  # value of KNOWN


class _Machine(NamedTuple):
    stack: list[Any]
    marks: list[int]  # lengths of the stack
    memo: dict[int, Any]


def load(data: bytes) -> Any:
    """Returns the content of a pickle: dicts, lists, tuples, texts, numbers, `PickledArray`.

    Args:
      data: the pickle, of protocol 2 or later.

    Raises:
      ValueError: the pickle is damaged, or refers to anything but NumPy's arrays.
    """
    machine = _Machine([], [], {})
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if opcode.name not in STEPS:
                raise ValueError(f"the instruction {opcode.name} at byte {position} is not allowed")
            STEPS[opcode.name](machine, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"the pickle is damaged ({type(error).__name__})") from error
    raise ValueError("the pickle is damaged (no end)")


def items(value: Any) -> list[Any]:
    """Returns the elements of a list, a tuple or an array in a pickle.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(value, PickledArray):
        return value.values()
    if isinstance(value, list | tuple):
        return list(value)
    raise ValueError(f"expected a list, got {type(value).__name__}")


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _pop_mark(machine: _Machine) -> list[Any]:
    start = machine.marks.pop()
    values = machine.stack[start:]
    del machine.stack[start:]
    return values


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: _push(machine, value)


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        values = tuple(machine.stack.pop() for _ in range(count))
        _push(machine, values[::-1])

    return step


def _put(machine: _Machine, number: int) -> None:
    machine.memo[number] = machine.stack[-1]


def _append(machine: _Machine, values: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise ValueError("the pickle is damaged (elements without a list)")
    target.extend(values)


def _set_items(machine: _Machine, values: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or len(values) % 2:
        raise ValueError("the pickle is damaged (entries without a dict)")
    target.update(zip(values[::2], values[1::2], strict=True))


def _name(machine: _Machine, module: Any, name: Any) -> None:
    if (module, name) not in KNOWN:
        raise ValueError(f"it refers to {module!s:.60}.{name!s:.60}, which is not allowed")
    _push(machine, _Name(KNOWN[module, name]))


def _global(machine: _Machine, argument: str) -> None:
    _name(machine, *argument.split(" ", 1))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    _name(machine, module, name)


def _reduce(machine: _Machine, _: Any) -> None:
    """Interprets a call of one of the known names."""
    arguments, function = machine.stack.pop(), machine.stack.pop()
    role = function.role if isinstance(function, _Name) else None
    if role == "array":
        _push(machine, PickledArray())
    elif role == "dtype" and isinstance(arguments[0], str) and DTYPE.fullmatch(arguments[0]):
        _push(machine, _Type(arguments[0]))
    elif role == "scalar" and isinstance(arguments[0], _Type) and isinstance(arguments[1], bytes):
        dtype = arguments[0].dtype()
        if dtype.hasobject or len(arguments[1]) != dtype.itemsize:
            raise ValueError("the pickle is damaged (a number of another size)")
        _push(machine, np.frombuffer(arguments[1], dtype)[0].item())
    else:
        raise ValueError("it calls something that is not an array, a type or a number of NumPy")


def _build(machine: _Machine, _: Any) -> None:
    """Interprets the state of an array or a type."""
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, _Type) and state[1] in ("<", ">", "|", "="):
        native = "<" if sys.byteorder == "little" else ">"
        target.order = native if state[1] == "=" else state[1]
    elif isinstance(target, PickledArray) and isinstance(state[2], _Type):
        shape, data = state[1], state[4]
        is_shape = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        is_rows = not state[3] or len(shape) <= 1  # Fortran's order is that of one axis
        if not is_shape or not is_rows or not isinstance(data, bytes | list):
            raise ValueError("the pickle is damaged (an array without shape or data)")
        target.shape, target.dtype, target.data = shape, state[2].dtype(), data
    else:
        raise ValueError("it fills something that is not an array or a type of NumPy")


STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE",
         "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        _push,
    ),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(
        ("BINGET", "LONG_BINGET"), lambda machine, number: _push(machine, machine.memo[number])
    ),
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: _push(machine, tuple(_pop_mark(machine))),
    "APPEND": lambda machine, _: _append(machine, [machine.stack.pop()]),
    "APPENDS": lambda machine, _: _append_marked(machine),
    "SETITEM": lambda machine, _: _set_last(machine),
    "SETITEMS": lambda machine, _: _set_marked(machine),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
}  # fmt: skip


def _append_marked(machine: _Machine) -> None:
    values = _pop_mark(machine)
    _append(machine, values)


def _set_last(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_items(machine, (key, value))


def _set_marked(machine: _Machine) -> None:
    values = _pop_mark(machine)
    _set_items(machine, values)
