"""A parser of optimized HLO: computations, their instructions, and the trip counts of loops."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clvr_jax.errors import ClvrError

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
# A line of a kernel's attributes may also begin with braces, `}}, metadata=...`.
_END = re.compile(r'\}(, execution_thread="\w+")?\s*$')
_ARRAY = re.compile(r"([a-z]+(\d*)\w*)\[([\d,]*)\]")
_UNCHANGED = ("copy", "bitcast", "convert", "reshape")


@dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Returns the name of the computation in an attribute such as `calls` or `body`."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def source(self) -> str:
        """Operation of the Python program, from `op_name`; "" for an instruction that the compiler added."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the root is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


class _Counter(NamedTuple):
    """An integer in a loop: an entry of the loop's state plus an offset; a constant if the entry is None."""

    entry: int | None
    offset: int


class _Limit(NamedTuple):
    """The condition of a loop: it runs while an entry of its state is less than `offset`."""

    entry: int
    offset: int


class Program:
    """A parsed program: computations by name, the entry's name, and the number of partitions, None if not given.

    Raises: ClvrError if the text is not an HLO module.
    """

    def __init__(self, text: str):
        partitions = re.match(r"HloModule .*\bnum_partitions=(\d+)", text)
        self.devices = int(partitions[1]) if partitions else None
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        lines = iter(text.splitlines())
        for line in lines:
            if header := _HEADER.match(line):
                computation = _read_computation(header[2], lines)
                self.computations[computation.name] = computation
                self.entry = computation.name if header[1] else self.entry
        if not self.entry:
            raise ClvrError("no program in this text; pass the result of compiled.as_text()")

    def trip_count(self, loop: Instruction, caller: Computation) -> int | None:
        """Returns the trip count of a `while`, from the compiler's note or its counter; None if it depends on data."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.attribute(name) or ""] for name in ("condition", "body"))
        limit, state = self._limit(condition), caller.instructions[loop.operands[0]]
        if limit is None or {state.opcode, body.root.opcode} != {"tuple"}:
            return None
        start = self._counter(state.operands[limit.entry], caller)
        step = self._counter(body.root.operands[limit.entry], body)
        if start is None or start.entry is not None or step is None or step.entry != limit.entry or step.offset < 1:
            return None
        return max(0, math.ceil((limit.offset - start.offset) / step.offset))

    def _limit(self, condition: Computation) -> "_Limit | None":
        """Returns the counter of a loop in its state, and its upper limit; None for another condition."""
        test, inside, given = condition.root, condition, list[_Counter | None]()
        if test.opcode == "fusion":
            given = [self._counter(name, condition) for name in test.operands]
            inside = self.computations[test.attribute("calls") or ""]
            test = inside.root
        direction = test.attribute("direction")
        if test.opcode != "compare" or direction not in ("LT", "LE"):
            return None
        counter, bound = (self._counter(name, inside, given) for name in test.operands)
        if counter is None or counter.entry is None or bound is None or bound.entry is not None:
            return None
        return _Limit(counter.entry, bound.offset - counter.offset + (direction == "LE"))

    def _counter(self, name: str, inside: Computation, given: Sequence[_Counter | None] = ()) -> _Counter | None:
        """Returns the value of an instruction; None if it is not a counter. given: values of a fusion's parameters."""
        instruction = inside.instructions[name]
        if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
            return _Counter(None, int(instruction.arguments))
        if instruction.opcode == "parameter" and given:
            return given[int(instruction.arguments)]
        if instruction.opcode == "get-tuple-element":
            of_state = inside.instructions[instruction.operands[0]].opcode == "parameter"
            return _Counter(int(instruction.attribute("index") or 0), 0) if of_state else None
        if instruction.opcode not in (*_UNCHANGED, "add", "fusion"):
            return None
        values = [self._counter(operand, inside, given) for operand in instruction.operands]
        if instruction.opcode in _UNCHANGED:
            return values[0]
        if instruction.opcode == "fusion":
            called = self.computations[instruction.attribute("calls") or ""]
            return self._counter(called.root.name, called, values)
        left, right = values
        if left is None or right is None or None not in (left.entry, right.entry):
            return None
        return _Counter(right.entry if left.entry is None else left.entry, left.offset + right.offset)


def array_bytes(type_text: str) -> int:
    """Returns the bytes of all arrays in a type, without the padding of layouts."""
    return sum(
        math.prod(int(side) for side in sides.split(",") if side) * int(bits or 8) // 8
        for dtype, bits, sides in _ARRAY.findall(type_text)
        if dtype != "token"
    )


def array_dtype(type_text: str) -> str:
    """Returns the element type of the first array in a type, such as `bf16`."""
    match = _ARRAY.search(type_text)
    return match[1] if match else ""


def top_level(text: str) -> list[str]:
    """Splits a text at the commas outside of all brackets, such as a tuple type without its parentheses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def _read_computation(name: str, lines: Iterator[str]) -> Computation:
    instructions: dict[str, Instruction] = {}
    root = None
    for line in lines:
        if _END.match(line):
            break
        if match := _INSTRUCTION.match(line):
            instruction = _read_instruction(match[2], match[3])
            instructions[instruction.name] = instruction
            root = instruction if match[1] or root is None else root
    if root is None:
        raise ClvrError(f"computation {name} of the compiled program has no instructions")
    return Computation(name, instructions, root)


def _read_instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest, 0) - 1
    arguments = rest[:close]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, text[:end], opcode, operands, arguments, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ClvrError(f"unbalanced parentheses in the compiled program: {text[start : start + 80]}")
