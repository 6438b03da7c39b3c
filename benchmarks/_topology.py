"""Compile for a chip that this machine does not have, and count memory traffic.

XLA's compilers for GPU and TPU accept a description of the chip. The result is the
memory that a program moves and holds, not the time that it takes.
"""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import _tpu_hlo
from ._hlo import main_computation, traffic

H100 = Path(__file__).with_name("h100.txtpb")
# libtpu reads these from a TPU host; this machine is not one.
V5E = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
}
COMPILER_PACKAGES = {"h100": "jax-cuda12-plugin", "v5e": "libtpu"}


class Cost(NamedTuple):
    """Hold the figures of a compiled program; what a chip does not tell is `None`.

    `traffic` is the bytes read and written in the chip's main memory, `accessed` what
    XLA's cost analysis says. `fused` is the number of fusions that hold a convolution
    and a reduction.
    """

    traffic: int
    temporary: int
    convolutions: int
    all_reduces: int
    accessed: int | None = None
    cycles: int | None = None
    fused: int | None = None


class Chip(NamedTuple):
    """Hold a chip to compile for, "h100" or "v5e", or several."""

    name: str
    mesh: Mesh

    def place(self, tree: Any, *spec: str) -> Any:
        """Return the shapes of `tree` on the chips, each alike or sharded by `spec`."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    def cost(self, function: Callable, *arguments: Any) -> Cost:
        """Compile `function` for arguments that `place` made, and count."""
        platform = "cuda" if self.name == "h100" else "tpu"
        traced = jax.jit(function).trace(*arguments)
        program: Any = traced.lower(lowering_platforms=(platform,)).compile()
        text = program.as_text()
        temporary = program.memory_analysis().temp_size_in_bytes
        all_reduces = len(
            re.findall(r" all-reduce(?:-start)?\(", main_computation(text))
        )
        if self.name == "h100":  # XLA has no cost analysis for it
            convolutions = text.count('custom_call_target="__cudnn$conv')
            return Cost(traffic(text), temporary, convolutions, all_reduces)
        counts = _tpu_hlo.count(text)
        return Cost(
            counts.hbm,
            temporary,
            len(re.findall(r" convolution\(", text)),
            all_reduces,
            int(program.cost_analysis()["bytes accessed"]),
            counts.cycles,
            counts.fused_convolutions,
        )


def describe(name: str, num_chips: int = 1) -> Chip:
    """Return the chip `name`, or a mesh of several, from its description.

    **Raises** `RuntimeError` if XLA's compiler for it is not installed.
    """
    jax.config.update("jax_platforms", "cpu")  # ignore local GPUs and TPUs
    try:
        devices = _topology(name).devices
    except Exception as error:  # each plugin raises its own error
        raise RuntimeError(
            f"To compile for {name}, XLA needs {COMPILER_PACKAGES[name]}, which did "
            f"not start: {error}. Install it in the version of jax, "
            f"{jax.__version__}, in a separate environment."
        ) from error
    return Chip(name, Mesh(np.array(devices[:num_chips]), ("data",)))


@cache
def _topology(name: str) -> Any:
    if name == "h100":
        return topologies.get_topology_desc(
            "", platform="cuda", target_config=H100.read_text(), topology="1x1x1"
        )
    os.environ.update(V5E)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
