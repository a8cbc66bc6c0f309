"""The communication of a compiled program: every collective with its bytes, its mesh axes, and how often it runs.

The compiler's cost analysis counts the body of a loop once; here a collective counts as often as the loops around it
run. Asynchronous collectives count where they start. Three forms are specific to the TPU compiler. A matrix product
that gathers or scatters one operand in pieces is a loop of collective-permutes (`windowed_dot_general`). A gather that
overlaps with other operations is started in one fusion (`AsyncCollectiveStart`) and appears again in every fusion that
continues it, often inside another loop, where it must not be counted. An `all-reduce-scatter` fusion contains an
all-reduce of which each device uses a part; it has the communication volume of a reduce-scatter.

Source: the optimized HLO of jaxlib 0.10.2 for CPU, and of libtpu 0.0.52 for v5e.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from clvr_jax.cost_model.hlo_text import Computation, Instruction, Program, array_bytes, array_dtype, top_level
from clvr_jax.errors import ClvrError

# Bytes that a device sends in a ring algorithm, as a multiple of the array's bytes times (n - 1) / n.
_RING = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}
_PART = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
KINDS = (*_RING, "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    kind: one of `KINDS`. name: of the instruction. source: its operation in the Python program, if the compiler knows
    it. dtype: in the notation of HLO. bytes: of the complete array (after a gather, before a scatter) on one device,
    for one execution. devices: number of devices in a group; 2 for a permute. axes: mesh axes; empty without a mesh.
    times: number of executions in the program.
    """

    kind: str
    name: str
    source: str
    dtype: str
    bytes: int
    devices: int
    axes: tuple[str, ...]
    times: int = 1

    @property
    def sent(self) -> float:
        """Communication volume: bytes that one device sends, and receives, in all executions with a ring algorithm."""
        share = _RING[self.kind] * (self.devices - 1) / self.devices if self.kind in _RING else 1.0
        return self.times * self.bytes * share

    @property
    def axis(self) -> str:
        """The axes as one text, such as `data+fsdp`."""
        return "+".join(self.axes)


def collectives(text: str, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """Lists the collectives of a compiled program.

    Args:
      text: `compiled.as_text()`, the program of one device.
      mesh: sizes of the mesh axes, outermost first (`mesh.shape`), which identify the axes of each collective.
    Returns: the collectives of more than one device, in program order.
    Raises: ClvrError if a collective is in a loop whose trip count depends on data, or does not match the mesh.
    """
    program, mesh = Program(text), dict(mesh or {})
    if mesh and program.devices not in (None, math.prod(mesh.values())):
        raise ClvrError(f"mesh {mesh} has {math.prod(mesh.values())} devices; the program is for {program.devices}")
    return _of_computation(program, program.computations[program.entry], mesh)


def sent_by_axis(found: Iterable[Collective]) -> dict[str, float]:
    """Returns the bytes that one device sends over each mesh axis (`data+fsdp` for two at once), largest first."""
    total: defaultdict[str, float] = defaultdict(float)
    for collective in found:
        total[collective.axis] += collective.sent
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def merged(found: Iterable[Collective]) -> list[Collective]:
    """Merges collectives of equal kind, axes, dtype and bytes, and adds their times; the largest volume comes first."""
    groups: dict[tuple[object, ...], Collective] = {}
    for collective in found:
        key = (collective.kind, collective.axes, collective.dtype, collective.bytes, collective.devices)
        known = groups.get(key)
        groups[key] = replace(known, times=known.times + collective.times) if known else collective
    return sorted(groups.values(), key=lambda collective: -collective.sent)


def _of_computation(program: Program, computation: Computation, mesh: dict[str, int]) -> list[Collective]:
    found: list[Collective] = []
    continues = _continues(computation)
    for instruction in computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS and not continues:
            found += _read(kind, instruction, computation, mesh, program.devices)
        elif instruction.opcode == "while":
            body = _of_computation(program, program.computations[instruction.attribute("body") or ""], mesh)
            found += _repeated(body, program.trip_count(instruction, computation) if body else 0, instruction)
        elif instruction.opcode == "conditional":
            branches = re.findall(r"%([\w.\-]+)", _braces("branch_computations", instruction.attributes))
            branches = branches or [instruction.attribute(f"{which}_computation") or "" for which in ("true", "false")]
            options = [_of_computation(program, program.computations[name], mesh) for name in branches]
            found += max(options, key=lambda option: sum(collective.sent for collective in option))
        elif instruction.opcode in ("fusion", "call", "async-start"):
            called = instruction.attribute("to_apply" if instruction.opcode == "call" else "calls") or ""
            inner = _of_computation(program, program.computations[called], mesh)
            found += [replace(one, source=one.source or instruction.source) for one in inner]
    return found


def _continues(computation: Computation) -> bool:
    """Returns whether a fusion continues or ends a collective that another fusion started."""
    attributes = "".join(i.attributes for i in computation.instructions.values() if i.opcode == "custom-call")
    stepping = computation.name.startswith("async_collective_fusion") or "AsyncCollectiveDone" in attributes
    return stepping and "AsyncCollectiveStart" not in attributes


def _repeated(body: list[Collective], trips: int | None, loop: Instruction) -> list[Collective]:
    if trips is None:
        raise ClvrError(
            f"{loop.name} ({loop.source or 'no source'}) has a trip count that depends on data and contains "
            f"{body[0].kind} {body[0].name}: its bytes cannot be counted"
        )
    return [replace(collective, times=collective.times * trips) for collective in body]


def _read(
    kind: str, instruction: Instruction, inside: Computation, mesh: dict[str, int], devices: int | None
) -> list[Collective]:
    everyone = devices or math.prod(mesh.values())
    groups = _pairs(instruction) if kind == "collective-permute" else _groups(instruction, everyone)
    together = groups.shape[1]
    if together < 2 or groups.size == 0:
        return []
    result = instruction.type
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        result = top_level(result[1:-1])[1]  # (operands, results, context)
    if kind == "all-reduce" and inside.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    whole = array_bytes(result) * (together if instruction.opcode.startswith("reduce-scatter") else 1)
    axes = _axes(groups, mesh, instruction.name) if mesh else ()
    return [Collective(kind, instruction.name, instruction.source, array_dtype(result), whole, together, axes)]


def _pairs(instruction: Instruction) -> np.ndarray:
    """Returns (pairs, 2): source and target of each message between different devices."""
    numbers = re.findall(r"\d+", _braces("source_target_pairs", instruction.attributes))
    pairs = np.array(numbers, dtype=int).reshape(-1, 2)
    out: np.ndarray = pairs[pairs[:, 0] != pairs[:, 1]]
    return out


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Returns (groups, devices of a group): positions in the program's order of devices, from XLA's three notations."""
    text = instruction.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{(\{.*?\})?\}", text):
        groups = [re.findall(r"\d+", group) for group in re.findall(r"\{([\d,]+)\}", listed[1] or "")]
        return np.array(groups, dtype=int) if groups else np.arange(devices)[None]
    if iota := re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(_integers(iota[1]))
    if named := re.match(r"mesh\[([^]]+)\](?:, device_ids=\((\S+)\))? \{([^}]+)\}", text):
        return _named_groups(*named.groups())
    raise ClvrError(f"{instruction.name}: cannot read its replica groups, {text[:80]!r}")


def _named_groups(axes: str, order: str | None, together: str) -> np.ndarray:
    """Returns the groups along axes of a mesh that the compiler defines, such as `'axis_0'=4,'axis_1'=2`.

    Args:
      axes: with their sizes, outermost first.
      order: of the devices, if they are not in order: `[2,4]T(1,0)`, or a list.
      together: the axes of a group, such as `'axis_0'`, or a sub-axis: `'axis_0':(2)4` is the middle one if the axis is
        split into 2, 4 and the rest.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    devices = np.arange(math.prod(sizes.values()))
    places = dict(zip(sizes, np.unravel_index(devices, list(sizes.values())), strict=True))
    label = np.zeros_like(devices)
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _PART.findall(together)}
    for name, place in places.items():
        before, size = parts.get(name, (1, 1))
        after = sizes[name] // (before * size)
        label = (label * before + place // (size * after)) * after + place % after
    if order:
        devices = (_iota(order) if order.startswith("[") else _integers(order)).ravel()
    return devices[np.argsort(label, kind="stable")].reshape(label.max() + 1, -1)


def _iota(text: str) -> np.ndarray:
    """Returns the array of an iota such as `[4,2]T(1,0)`: 0, 1, ... in that shape, then transposed."""
    shape, _, order = text.partition("T")
    sides = _integers(shape)
    return np.arange(math.prod(sides)).reshape(sides).transpose(_integers(order) if order else None)


def _integers(text: str) -> np.ndarray:
    return np.array(re.findall(r"\d+", text), dtype=int)


def _axes(groups: np.ndarray, mesh: dict[str, int], name: str) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ."""
    if groups.max() >= math.prod(mesh.values()):
        raise ClvrError(f"mesh {mesh} has {math.prod(mesh.values())} devices; {name} uses device {groups.max()}")
    places = np.stack(np.unravel_index(groups, list(mesh.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, differs in zip(mesh, differ, strict=True) if differs)


def _braces(attribute: str, text: str) -> str:
    """Returns the text in the braces of an attribute, such as `{{0,1},{1,0}}`; empty if the attribute is absent."""
    match = re.search(attribute + r"=(\{(?:[^{}]|\{[^{}]*\})*\})", text)
    return match[1] if match else ""
