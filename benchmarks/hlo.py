"""Counts the bytes that a compiled program moves, and its kernels, from the program's text.

The compiler's own count, `cost_analysis()["bytes accessed"]`, does not exist for a GPU that is not
present, and for a TPU it includes copies between memories on the chip. This module counts only
device memory: the operands and results of each instruction of the entry computation, except those
whose layout names another memory, such as `f32[8,128]{1,0:T(8,128)S(1)}`. Sizes are computed from
the shapes, without padding. For a fusion, each operand counts as a whole, even if the fusion reads
only a slice of it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

# Instructions that move nothing: their result exists already, or before the program starts.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
_FREE_CALLS = {"ConcatBitcast", "AllocateBuffer"}
_SLICES = {"slice", "dynamic-slice", "gather"}

_ARRAY = re.compile(r"\b(?:(pred)|(?:bf|f|s|u|c)(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)(.*)$", re.MULTILINE
)
_NAME = re.compile(r"%[\w.\-]+")


@dataclasses.dataclass(frozen=True)
class Array:
    """The size of an array in bytes, whether it is a scalar, and whether it is in device memory."""

    bytes: float
    scalar: bool
    in_device_memory: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read from and written to device memory, and the kernels that do so."""

    bytes: float = 0
    kernels: int = 0


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape in HLO's notation; for a tuple, all of its arrays."""
    return [
        Array(
            (1 if pred else int(bits) / 8) * math.prod(int(n) for n in dims.split(",") if n),
            scalar=not dims,
            in_device_memory="S(" not in layout,
        )
        for pred, bits, dims, layout in _ARRAY.findall(shape)
    ]


def traffic(text: str) -> Traffic:
    """Returns the bytes that the program moves in one run, and its number of kernels.

    A loop counts once per iteration if the compiler knows the number of iterations, otherwise once.
    A conditional counts its most expensive branch. An instruction on scalars only is not a kernel,
    unless it is a fusion, a custom call or a reduction.

    Args:
      text: `as_text()` of a compiled program.

    Raises:
      ValueError: if the text has no entry computation.
    """
    bodies, entry = {}, ""
    for is_entry, name, body in _COMPUTATION.findall(text):
        bodies[name] = body
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("the text has no entry computation. Pass as_text() of a compiled program.")
    return _computation(entry, bodies)


def _sum(parts: Iterable[Traffic], times: int = 1) -> Traffic:
    parts = list(parts)
    return Traffic(times * sum(x.bytes for x in parts), times * sum(x.kernels for x in parts))


def _computation(name: str, bodies: dict[str, str]) -> Traffic:
    parts, shapes = [], {}
    for result, shape, opcode, operands, rest in _INSTRUCTION.findall(bodies[name]):
        shapes[result] = arrays(shape)
        called = [_computation(body, bodies) for body in _called(opcode, rest)]
        if opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            parts.append(_sum(called, int(trips[1]) if trips else 1))
        elif opcode == "conditional":
            parts.append(max(called, key=lambda branch: branch.bytes))
        elif called:
            parts += called
        else:
            # A kernel that has the same operand twice reads it once.
            given = [x for name in dict.fromkeys(_NAME.findall(operands)) for x in shapes[name]]
            parts.append(_instruction(opcode, rest, given, shapes[result]))
    return _sum(parts)


def _called(opcode: str, rest: str) -> list[str]:
    """Returns the computations that run as separate programs, not as part of one kernel."""
    keys = {
        "while": "body|condition",
        "conditional": "branch_computations|true_computation|false_computation",
        "call": "to_apply",
        "async-start": "calls",
    }
    if opcode not in keys:
        return []
    found = re.findall(rf"\b(?:{keys[opcode]})=(%[\w.\-]+|\{{[^}}]*\}})", rest)
    return [name for names in found for name in _NAME.findall(names)]


def _instruction(opcode: str, rest: str, given: list[Array], results: list[Array]) -> Traffic:
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    if opcode in _FREE or opcode.endswith("-done") or (target and target[1] in _FREE_CALLS):
        return Traffic()
    if opcode.endswith("-start"):
        # The result of a copy or a slice names source and destination; the smaller size is moved.
        size = min(end.bytes for end in results[:2])
        return Traffic(size * sum(end.in_device_memory for end in results[:2]))
    moved = [x.bytes for x in results if x.in_device_memory]
    most = sum(x.bytes for x in results) if opcode in _SLICES else math.inf
    moved += [min(x.bytes, most) for x in given if x.in_device_memory]
    scalar = all(x.scalar for x in results) and opcode not in ("fusion", "custom-call", "reduce")
    return Traffic(sum(moved), kernels=not scalar)
