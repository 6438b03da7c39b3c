"""Growth of time with the batch size, the number of features and of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

from ._layers import measure
from ._session import Session
from ._shapes import growing_batch, growing_features

LIBRARIES = ("jaxbn", "flax.linen", "torch contiguous")


def run(session: Session) -> dict:
    """Return times by batch size, by features and by devices, in float32."""
    subset = session.only(*LIBRARIES)
    shapes = {
        "examples": growing_batch(
            range(8, 13, 4) if session.quick else range(6, 19, 2)
        ),
        "features": growing_features(
            range(5, 10, 4) if session.quick else range(3, 14, 2)
        ),
    }
    cells = [(along, shape) for along in shapes for shape in shapes[along]]
    rows = []
    for along, shape in session.track(cells, "growth"):
        times, _ = measure(subset, shape, "float32", ("forward", "backward"))
        rows += [{"along": along} | row for row in times]
    return {"rows": rows, "devices": devices(session)}


def devices(session: Session) -> list[dict]:
    """Run `_devices.py` in a new process: JAX fixes its devices when it starts."""
    libraries = [n for n in ("jaxbn.linen", "flax.linen") if n in session.libraries]
    here = Path(__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks._devices", str(session.seed)]
    child = subprocess.run(
        [*command, str(int(session.quick)), *libraries],
        cwd=here,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(child.stdout)
