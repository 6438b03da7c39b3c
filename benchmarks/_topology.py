"""Compile for a chip that this machine does not have, and count what it will move.

XLA's own compilers for GPU and TPU run from a description of the chip. So this says how
much memory a program moves and holds there, but not how long it takes.
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
# libtpu asks these of the machine it runs on, which is no TPU host here.
V5E = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
LIBRARY = {"h100": "jax-cuda12-plugin", "v5e": "libtpu"}


class Cost(NamedTuple):
    """Bytes that a program reads and writes, and its temporary memory in bytes."""

    traffic: float
    temporary: int


class Chip(NamedTuple):
    """One chip to compile for: "h100" or "v5e"."""

    name: str
    sharding: NamedSharding

    def cost(self, function: Callable, *arguments: Any) -> Cost:
        """Compile `function` for arrays like `arguments`, which need no values."""
        shapes = jax.tree.map(self._on_chip, arguments)
        platform = "cuda" if self.name == "h100" else "tpu"
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))
        program: Any = lowered.compile()  # typed to lack what it has on these chips
        memory = program.memory_analysis()
        if self.name == "h100":  # where XLA has no cost analysis
            moved = traffic(program.as_text())
        else:
            moved = program.cost_analysis()["bytes accessed"]
        return Cost(moved, memory.temp_size_in_bytes)

    def _on_chip(self, array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.sharding)


def describe(name: str) -> Chip:
    """The chip `name`, from its description.

    **Raises** `RuntimeError` where XLA's compiler for it is not installed.
    """
    jax.config.update("jax_platforms", "cpu")  # look for no GPU or TPU
    try:
        devices = _topology(name).devices
    except Exception as error:  # each plugin fails in its own way
        raise RuntimeError(
            f"To compile for {name}, XLA needs {LIBRARY[name]}, which did not start: "
            f"{error}. Install it in the version of jax, {jax.__version__}, in an "
            "environment of its own."
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
