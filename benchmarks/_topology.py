"""Compile for a chip that this machine does not have, and count memory traffic.

XLA's compilers for GPU and TPU accept a description of the chip. The result is the
memory that a program moves and holds, not the time that it takes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._hlo import traffic

H100 = Path(__file__).with_name("h100.txtpb")
# libtpu reads these from a TPU host; this machine is not one.
V5E = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
COMPILER_PACKAGES = {"h100": "jax-cuda12-plugin", "v5e": "libtpu"}


class Cost(NamedTuple):
    """Hold the bytes that a program reads and writes, and its temporary memory."""

    traffic: float
    temporary: int


class Chip(NamedTuple):
    """Hold a chip to compile for: "h100" or "v5e"."""

    name: str
    sharding: NamedSharding

    def cost(self, function: Callable, *arguments: Any) -> Cost:
        """Compile `function` for arrays with the shapes and dtypes of `arguments`."""
        shapes = jax.tree.map(self._on_chip, arguments)
        platform = "cuda" if self.name == "h100" else "tpu"
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))
        program: Any = lowered.compile()  # its declared type lacks the analyses below
        memory = program.memory_analysis()
        if self.name == "h100":  # XLA has no cost analysis for it
            num_bytes = traffic(program.as_text())
        else:
            num_bytes = program.cost_analysis()["bytes accessed"]
        return Cost(num_bytes, memory.temp_size_in_bytes)

    def _on_chip(self, array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.sharding)


def describe(name: str) -> Chip:
    """Return the chip `name`, from its description.

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
    mesh = Mesh(np.array(devices[:1]), ("device",))
    return Chip(name, NamedSharding(mesh, PartitionSpec()))


def _topology(name: str) -> Any:
    if name == "h100":
        return topologies.get_topology_desc(
            "", platform="cuda", target_config=H100.read_text(), topology="1x1x1"
        )
    os.environ.update(V5E)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
