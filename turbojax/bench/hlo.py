"""Optimized HLO as text: which kernels a compiled function launches, and how many bytes each moves.

    for kernel in kernels(jax.jit(f).lower(*arguments).compile().as_text()): ...

A function can be compiled for a GPU that is not there (`jax.experimental.topologies`), so that bytes are known before
anything runs.
"""

import math
import re
from typing import NamedTuple

import jax.numpy as jnp

# What launches nothing, or is counted where it starts. A loop's own body is listed on request.
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "opt-barrier", "after-all", "while"}
FREE |= {"fusion-done", "async-done", "copy-done"}
NAMES = {"pred": "bool", "bf16": "bfloat16", "f8e4m3fn": "float8_e4m3fn", "s": "int", "u": "uint", "f": "float"}


class Array(NamedTuple):
    """One array of a shape: its dtype as HLO writes it, and its sizes."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        name = NAMES.get(self.dtype) or NAMES[self.dtype[0]] + self.dtype[1:]
        return self.elements * jnp.dtype(name).itemsize


class Instruction(NamedTuple):
    """name = outputs opcode(operands), attributes."""

    name: str
    outputs: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str:
        """Returns the first group of a pattern in the attributes, or an empty string."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


class Kernel(NamedTuple):
    """One kernel launch.

    inputs, outputs: what it moves (a slice of a stack counts alone); source: where it was traced; inside: names by
    which a profile may list what the instruction wraps.
    """

    name: str
    opcode: str
    source: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    inside: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in (*self.inputs, *self.outputs))


Computation = dict[str, Instruction]


def kernels(text: str, *, within: str | None = None) -> list[Kernel]:
    """Returns the launches of one computation, in order: the entry, or a loop's body from `loop_bodies`."""
    computations = parse(text)
    computation = computations[within or entry(text)]
    return [kernel(i, computation, computations) for i in computation.values() if i.opcode not in FREE]


def loop_bodies(text: str) -> list[str]:
    """Returns the names of the bodies of the while loops."""
    return re.findall(r" while\(.*?body=%?([\w.-]+)", text)


def entry(text: str) -> str:
    """Returns the name of the entry computation."""
    found = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    assert found, "no HLO module"
    return found.group(1)


def parse(text: str) -> dict[str, Computation]:
    """Returns every computation's instructions by name."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line)
        if header:
            current = computations.setdefault(header.group(1), {})
        elif " = " in line and line.startswith(" "):
            instruction = parse_instruction(re.sub(r"/\*.*?\*/", "", line.strip()))
            current[instruction.name] = instruction
    return computations


def parse_instruction(line: str) -> Instruction:
    """Reads one line of a computation."""
    left, right = line.split(" = ", 1)
    shape, right = split_parenthesis(right) if right.startswith("(") else right.split(" ", 1)
    opcode, right = right.split("(", 1)
    operands, attributes = split_parenthesis("(" + right)
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        outputs=arrays(shape),
        opcode=opcode.strip(),
        operands=tuple(re.findall(r"%([\w.-]+)", operands)),
        attributes=attributes,
        root=left.startswith("ROOT "),
    )


def split_parenthesis(text: str) -> tuple[str, str]:
    """Splits a text that starts with a parenthesis after the closing one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced: {text[:80]}")


def arrays(shape: str) -> tuple[Array, ...]:
    """Reads the arrays of a shape, of a tuple all of them."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    return tuple(Array(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found)


def kernel(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> Kernel:
    """Returns an instruction's launch; of a fusion with what the computation inside it reads and writes."""
    operands = [computation[name].outputs for name in instruction.operands]
    called = instruction.attribute(r"calls=%?([\w.-]+)")
    inner = computations[called] if called else {}
    outputs, last = instruction.outputs, next((i for i in inner.values() if i.root), instruction)
    if instruction.opcode.endswith("-start"):
        outputs = last.outputs
    if inner:
        operands = [read_inside(i, inner) for i in inner.values() if i.opcode == "parameter"]
    if last.opcode == "dynamic-update-slice":
        outputs = inner[last.operands[1]].outputs if inner else computation[last.operands[1]].outputs
    target = last.attribute(r'custom_call_target="([^"]*)"')
    if target.startswith("__cu"):
        outputs = outputs[:1]  # the rest is workspace
    return Kernel(
        name=instruction.name,
        opcode=target or instruction.opcode,
        source=last.attribute(r'op_name="([^"]*)"') or instruction.attribute(r'op_name="([^"]*)"'),
        inputs=tuple(array for arrays in operands for array in arrays),
        outputs=outputs,
        inside=tuple(i.name for i in inner.values() if i.opcode in ("custom-call", "fusion")),
    )


def read_inside(parameter: Instruction, computation: Computation) -> tuple[Array, ...]:
    """Returns what a fusion reads of a parameter: slices alone, and nothing of what it only overwrites."""
    users = users_of(parameter.name, computation)
    opcodes = {user.opcode if user.operands[0] == name else "" for user, name in users}
    if opcodes == {"dynamic-slice"}:
        return tuple(array for user, _ in users for array in user.outputs)
    return () if opcodes == {"dynamic-update-slice"} else parameter.outputs


def users_of(name: str, computation: Computation) -> list[tuple[Instruction, str]]:
    """Returns the instructions that use a value, through bitcasts, with the name that they use it by."""
    users = []
    for instruction in computation.values():
        if name in instruction.operands:
            bitcast = instruction.opcode == "bitcast"
            users += users_of(instruction.name, computation) if bitcast else [(instruction, name)]
    return users
