"""Count HBM bytes and estimated cycles of a program compiled for a TPU.

XLA's own cost analysis counts copies into VMEM, the fast memory, as it counts HBM
traffic, and takes the dearer branch of a conditional.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from ._hlo import (
    NO_TRAFFIC,
    Computations,
    Instruction,
    array_size,
    bytes_read,
    bytes_sliced,
    called_body,
    computations,
)

NO_HBM_TRAFFIC = NO_TRAFFIC | {"after-all", "partition-id"}
SLICES = {"slice", "dynamic-slice"}
# Starts of asynchronous copies; their ends name the same buffers again.
STARTS = ("copy-start", "slice-start", "dynamic-slice-start")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
UNKNOWN_CYCLES = 10**12  # beyond any fusion: libtpu writes such numbers for no estimate


class Counts(NamedTuple):
    """Hold bytes through HBM, cycles, and fusions with convolution and reduction."""

    hbm: int
    cycles: int
    fused_convolutions: int


def count(hlo: str) -> Counts:
    """Count an optimized program; of a conditional, the branch that moves least.

    The cycles are the compiler's own estimates for each fusion, added up as if one ran
    after the other: no time.
    """
    program = computations(hlo)
    entry = program["ENTRY"]
    fused = sum({"convolution", "reduce"} <= _operations(i, program) for i in entry)
    return Counts(_hbm(entry, program), _cycles(entry, program), fused)


def _hbm(body: list[Instruction], program: Computations) -> int:
    sizes = {i.name: _hbm_bytes(i) for i in body}
    return sum(_hbm_of(i, sizes, program) for i in body)


def _hbm_of(i: Instruction, sizes: dict[str, int], program: Computations) -> int:
    if i.op in NO_HBM_TRAFFIC or i.op.endswith(("-done", "-update")):
        return 0
    if i.op == "conditional":
        return min(_hbm(program[branch], program) for branch in _branches(i))
    if i.op in STARTS:
        return _copied(i)
    sliced = bytes_sliced(called_body(i, program), _hbm_bytes, SLICES)
    # An operand in VMEM has no bytes in HBM, whatever part of it is read.
    sliced = {k: min(n, sizes.get(i.operands[k], 0)) for k, n in sliced.items()}
    return bytes_read(i, sizes, sliced) + sizes[i.name]


def _copied(start: Instruction) -> int:
    """Return the bytes of an asynchronous copy, once for each end in HBM."""
    first, second, *_ = ARRAY.findall(start.type)
    target = first if start.op == "copy-start" else second
    ends_in_hbm = sum("S(" not in layout for _, _, layout in (first, second))
    return array_size(*target[:2]) * ends_in_hbm


def _hbm_bytes(i: Instruction) -> int:
    """Return the bytes of a result in HBM; memory space 1, `S(1)`, is VMEM."""
    arrays = ARRAY.findall(i.type)
    return sum(
        array_size(d, shape) for d, shape, layout in arrays if "S(" not in layout
    )


def _cycles(body: list[Instruction], program: Computations) -> int:
    return sum(_cycles_of(i, program) for i in body)


def _cycles_of(i: Instruction, program: Computations) -> int:
    if i.op == "conditional":
        return min(_cycles(program[branch], program) for branch in _branches(i))
    estimate = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    cycles = int(estimate[1]) if estimate else 0
    return cycles if cycles < UNKNOWN_CYCLES else 0


def _branches(conditional: Instruction) -> list[str]:
    """Return the names of a conditional's computations."""
    named = re.search(r"branch_computations=\{(.*?)\}", conditional.attributes)
    if named:
        return re.findall(r"%([\w.-]+)", named[1])
    return re.findall(r"(?:true|false)_computation=%([\w.-]+)", conditional.attributes)


def _operations(i: Instruction, program: Computations) -> set[str]:
    """Return the operations of a fusion, those of the fusions in it included."""
    return set(_nested_operations(called_body(i, program), program))


def _nested_operations(body: list[Instruction], program: Computations) -> Iterator[str]:
    for i in body:
        yield i.op
        yield from _nested_operations(called_body(i, program), program)
