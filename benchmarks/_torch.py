"""PyTorch as a peer, in a process of its own that works between our samples."""

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

# glibc keeps what is freed, so that no page is faulted in twice.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
MANY_FAULTS, TRIES = 100, 4
LAYOUTS = {"torch channels-last": True, "torch contiguous": False}


class Torch:
    """The worker; `version`, or why it is `missing`."""

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
        greeting = json.loads(self._process.stdout.readline() or "{}")
        self.version = greeting.get("version")
        if self.version is None:
            self.missing = greeting.get("missing", "it did not start")

    def _ask(self, **message: Any) -> dict:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"PyTorch's process ended at {message}")
        return json.loads(answer)

    def layouts(self, task: Task) -> list[str]:
        """The memory layouts torch knows for this rank."""
        return list(LAYOUTS) if task.x.ndim == 4 else ["torch contiguous"]

    def open(self, task: Task, name: str) -> Results:
        """Give the worker a task; what it computes for it."""
        given, returned = (Path(self._folder.name) / f for f in ("in.npz", "out.npz"))
        arrays: Any = {
            n: np.asarray(getattr(task, n), np.float32)
            for n in ("x", "dy", "scale", "bias", "mean", "var")
        }
        np.savez(given, **arrays)
        self._ask(
            do="open",
            case=name,
            path=str(given),
            results=str(returned),
            dtype=task.dtype,
            axis=task.axis,
            channels_last=LAYOUTS[name],
            momentum=task.momentum,
        )
        return Results(**np.load(returned))

    def sampler(self, name: str, work: str) -> Callable[[], float]:
        """A sample of a work that was opened, in seconds a call."""
        run = {"do": "run", "case": name, "work": work}
        calls = calls_for(self._ask(**run, calls=1, warm=True)["seconds"])

        def sample() -> float:
            """Again where pages were faulted in: at first glibc's heap still grows."""
            answer, tries = {"faults": MANY_FAULTS}, 0
            while answer["faults"] >= MANY_FAULTS and tries < TRIES:
                answer = self._ask(**run, calls=calls, warm=calls > 1)
                tries += 1
            return answer["seconds"]

        return sample

    def forget(self) -> None:
        """Drop all tasks."""
        self._ask(do="close")

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.communicate()
        self._folder.cleanup()
