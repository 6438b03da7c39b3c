"""One batch sharded over 1, 2, 4 and 8 CPU devices: time and collectives.

The number of cores stays the same: added time is the cost of sharding and merging.
"""

import json
import math
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ._libraries import linen
from ._programs import Program
from ._shapes import Shape
from ._task import random_task
from ._timing import interleave, sampler, summarize

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(text: str) -> list[tuple[str, int]]:
    """Return the kind and the result's bytes of each collective in a program."""
    found = re.findall(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(", text)
    return [(kind, num_bytes(shapes)) for shapes, kind in found]


def num_bytes(shapes: str) -> int:
    """Return the bytes of HLO shapes: 40 for `(f32[2,3]{1,0}, f32[4]{0})`."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        BYTES[kind] * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in arrays
    )


def programs(name: str, devices: int, shape: Shape, seed: int) -> dict:
    """Compile a linen layer under `shard_map`: forward, and forward with backward."""
    task = random_task(np.random.default_rng(seed), shape, "float32")
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    x, dy = jax.device_put((task.x, task.dy), NamedSharding(mesh, P("data")))
    replicated = NamedSharding(mesh, P())
    layer = linen(name, axis_name="data")(task)
    params, state = jax.device_put((layer.params, layer.state), replicated)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P("data"), P()),
    )
    def forward(params, state, x):
        return layer.train(params, state, x)

    def both(params, state, x, dy):
        y, vjp, state = jax.vjp(
            lambda params, x: forward(params, state, x), params, x, has_aux=True
        )
        return y, state, vjp(dy)

    return {
        "forward": Program(forward, params, state, x),
        "both": Program(both, params, state, x, dy),
    }


def measure(names: list[str], quick: bool, seed: int) -> list[dict]:
    """Return a row for each library, number of devices and phase."""
    shape = Shape("", (512, 64) if quick else (32, 28, 28, 256))
    compiled = {
        (name, devices, phase): program
        for name in names
        for devices in ((1, 8) if quick else (1, 2, 4, 8))
        for phase, program in programs(name, devices, shape, seed).items()
    }
    samples = interleave(
        {case: sampler(program) for case, program in compiled.items()},
        rounds=5 if quick else 40,
        rng=np.random.default_rng(seed),
        limit=2 if quick else 30,
    )
    return [
        {"library": name, "devices": devices, "phase": phase, "dims": shape.dims}
        | summarize(samples[name, devices, phase])._asdict()
        | {"collectives": collectives(program.compiled().as_text())}
        for (name, devices, phase), program in compiled.items()
    ]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jnp.zeros(())  # starts the backend, which fixes the number of devices
    seed, quick, *names = sys.argv[1:]
    print(json.dumps(measure(names, quick == "1", int(seed))))
