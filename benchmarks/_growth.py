"""How time grows: with rows, with channels, with devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

from ._layers import measure
from ._session import Session
from ._shapes import channels_of, rows_of

PEERS = ("jaxbn", "flax.linen", "torch contiguous")


def run(session: Session) -> dict:
    """Rows of times by rows and channels, float32; the devices' from a process."""
    few = session.only(*PEERS)
    rows = rows_of(range(8, 13, 4) if session.quick else range(6, 19, 2))
    channels = channels_of(range(5, 10, 4) if session.quick else range(3, 14, 2))
    cells = [("rows", shape) for shape in rows] + [("channels", s) for s in channels]
    found = []
    for along, shape in session.track(cells, "growth"):
        times, _ = measure(few, shape, "float32", ("forward", "backward"))
        found += [{"along": along} | row for row in times]
    return {"rows": found, "devices": devices(session)}


def devices(session: Session) -> list[dict]:
    """The rows of `_devices.py`: JAX has its number of devices from its start."""
    peers = [name for name in ("jaxbn.linen", "flax.linen") if name in session.peers]
    here = Path(__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks._devices", str(session.seed)]
    child = subprocess.run(
        [*command, str(int(session.quick)), *peers],
        cwd=here,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(child.stdout)
