"""PyTorch in a separate process, which runs between the samples of JAX."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ._machine import cores
from ._task import Results, Task
from ._timing import calls_for

# glibc keeps freed memory, so that no page faults twice.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
MAX_FAULTS, MAX_TRIES = 100, 4
LAYOUTS = {"torch channels-last": True, "torch contiguous": False}


class Torch:
    """Control the worker; either `version` or the error `missing` is set."""

    def __init__(self, python: str):
        self._folder = tempfile.TemporaryDirectory()
        self.version: str | None = None
        self.missing: str | None = None
        self._process: Any = None
        worker = Path(__file__).with_name("_torch_worker.py")
        try:
            self._process = subprocess.Popen(
                [python, str(worker), str(cores())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | KEEP_MEMORY,
            )
        except OSError as error:
            self.missing = error.strerror
            return
        handshake = json.loads(self._process.stdout.readline() or "{}")
        self.version = handshake.get("version")
        if self.version is None:
            self.missing = handshake.get("missing", "it did not start")

    def _request(self, **message: Any) -> dict:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"PyTorch's process ended at {message}")
        return json.loads(answer)

    def layouts(self, task: Task) -> list[str]:
        """Return PyTorch's memory layouts for the rank of x."""
        return list(LAYOUTS) if task.x.ndim == 4 else ["torch contiguous"]

    def open(self, task: Task, name: str) -> Results:
        """Send a task to the worker and return its results."""
        sent, returned = (Path(self._folder.name) / f for f in ("in.npz", "out.npz"))
        arrays: Any = {
            n: np.asarray(getattr(task, n), np.float32)
            for n in ("x", "dy", "scale", "bias", "mean", "var")
        }
        np.savez(sent, **arrays)
        self._request(
            do="open",
            case=name,
            path=str(sent),
            results=str(returned),
            dtype=task.dtype,
            axis=task.axis,
            channels_last=LAYOUTS[name],
            momentum=task.momentum,
        )
        return Results(**np.load(returned))

    def sampler(self, name: str, phase: str) -> Callable[[], float]:
        """Return a function that times a phase of an open task, in seconds per call."""
        run = {"do": "run", "case": name, "phase": phase}
        calls = calls_for(self._request(**run, calls=1, warm=True)["seconds"])

        def sample() -> float:
            """Repeat after page faults: glibc's heap grows in the first calls."""
            answer, tries = {"faults": MAX_FAULTS}, 0
            while answer["faults"] >= MAX_FAULTS and tries < MAX_TRIES:
                answer = self._request(**run, calls=calls, warm=calls > 1)
                tries += 1
            return answer["seconds"]

        return sample

    def release(self) -> None:
        """Free all tasks."""
        self._request(do="close")

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.communicate()
        self._folder.cleanup()
