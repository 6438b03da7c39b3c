"""Count the bytes that a compiled program moves, from its optimized HLO text.

XLA's GPU compiler turns each line of the entry computation into a kernel: its operands
and results go through device memory, and intermediate values of a fusion stay in
registers. XLA's own cost analysis does not support a GPU that is only described.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Operations that only rename existing buffers.
NO_TRAFFIC = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
# Operations that run another computation, an unknown number of times.
UNCOUNTABLE = {"call", "conditional", "while"}

ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) "
    r"(?P<op>[\w-]+)\((?P<operands>.*?)\)(?:, (?P<attributes>.*))?$"
)
COMPUTATION = re.compile(
    r"^(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*?\{\n(?P<body>.*?)^\}", re.M | re.S
)


class Instruction(NamedTuple):
    """Hold one line of a computation; a parameter's operand is its number."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str


Computations = dict[str, list[Instruction]]


class Kernel(NamedTuple):
    """Hold the bytes that one kernel launch reads and writes."""

    name: str
    read: int
    written: int


def traffic(hlo: str) -> int:
    """Return the bytes that all kernels of a program read and write."""
    return sum(kernel.read + kernel.written for kernel in kernels(hlo))


def kernels(hlo: str) -> list[Kernel]:
    """Return the kernels of the entry computation, in order.

    Each operand is read once, each result written once. A fusion that only slices an
    operand reads the slices. The scratch space of a custom call (a convolution) is not
    counted, because its number of uses is unknown.

    **Raises** `ValueError` if the program contains a loop, a call or a branch.

    >>> kernels('''
    ... ENTRY %main (x: f32[4,8]) -> bf16[4,8] {
    ...   %x = f32[4,8]{1,0} parameter(0)
    ...   ROOT %y = bf16[4,8]{1,0} convert(%x)
    ... }
    ... ''')
    [Kernel(name='y', read=128, written=64)]
    """
    program = computations(hlo)
    entry = program["ENTRY"]
    sizes = {i.name: _size(i) for i in entry}
    return [
        Kernel(i.name, _bytes_read(i, sizes, program), sizes[i.name])
        for i in entry
        if i.op not in NO_TRAFFIC
    ]


def main_computation(hlo: str) -> str:
    """Return the text of the entry computation, without branches and fusions."""
    return hlo[hlo.index("\nENTRY ") :]


def computations(hlo: str) -> Computations:
    """Parse the instructions of each computation; the entry is named "ENTRY"."""
    hlo = re.sub(r"/\*.*?\*/", "", hlo)  # comments: /*index=5*/
    return {
        "ENTRY" if found["entry"] else found["name"]: list(_instructions(found["body"]))
        for found in COMPUTATION.finditer(hlo)
    }


def _instructions(body: str) -> Iterator[Instruction]:
    for line in body.splitlines():
        if found := INSTRUCTION.match(line):
            name, type_, op, operands, attributes = found.groups()
            words = (operand.split(" ")[-1] for operand in operands.split(", "))
            names = tuple(word.removeprefix("%") for word in words)
            yield Instruction(name, type_, op, names, attributes or "")


def _size(instruction: Instruction) -> int:
    """Return the bytes of an instruction's result, summed over its arrays."""
    arrays = ARRAY.findall(instruction.type)
    if instruction.op == "custom-call":
        arrays = [(dtype, shape) for dtype, shape in arrays if dtype != "u8"]
    return sum(array_size(dtype, shape) for dtype, shape in arrays)


def array_size(dtype: str, shape: str) -> int:
    """Return the bytes of an array: 24 for "f32" and "2,3"."""
    bits = re.search(r"\d+", dtype)  # the first number: 8 in f8e4m3fn
    width = max(int(bits[0]) // 8, 1) if bits else 1  # pred
    return width * math.prod(int(n) for n in shape.split(",") if n)


def _bytes_read(
    instruction: Instruction, sizes: dict[str, int], program: Computations
) -> int:
    if instruction.op in UNCOUNTABLE:
        raise ValueError(
            f"Kernels can be counted in straight-line HLO only; got "
            f"{instruction.op} %{instruction.name}. Unroll it, or count its body."
        )
    sliced = bytes_sliced(called_body(instruction, program), _size, {"slice"})
    return bytes_read(instruction, sizes, sliced)


def bytes_read(
    instruction: Instruction, sizes: dict[str, int], sliced: dict[int, int]
) -> int:
    """Return the bytes read; an operand that is named twice counts once.

    `sliced` holds, by number, the bytes of operands that are not read as a whole.
    """
    read: dict[str, int] = {}
    for i, operand in enumerate(instruction.operands):
        size = sliced.get(i, sizes.get(operand, 0))
        read[operand] = max(read.get(operand, 0), size)
    return sum(read.values())


def called_body(instruction: Instruction, program: Computations) -> list[Instruction]:
    """Return the instructions of a fusion, none for another operation."""
    called = re.search(r"calls=%([\w.-]+)", instruction.attributes)
    return program.get(called[1], []) if called else []


def bytes_sliced(
    body: list[Instruction], size: Callable[[Instruction], int], slices: set[str]
) -> dict[int, int]:
    """Return the slices' bytes, by number, of parameters that are only sliced."""
    return {
        int(parameter.operands[0]): sum(map(size, users))
        for parameter in body
        if parameter.op == "parameter"
        and (users := _users(parameter, body))
        and all(user.op in slices for user in users)
    }


def _users(array: Instruction, body: list[Instruction]) -> list[Instruction]:
    """Return the instructions that read an array, or a bitcast of it."""
    users = [i for i in body if array.name in i.operands]
    return [
        reader
        for user in users
        for reader in (_users(user, body) if user.op == "bitcast" else [user])
    ]
