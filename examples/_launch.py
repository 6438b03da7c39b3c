"""Processes that live and die together: start, watch, end, and start again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console


def launch(commands: Callable[[int], list[list[str]]], restarts: int) -> None:
    """Run `commands(attempt)` together, again when one fails; then exit with 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    for attempt in range(restarts + 1):
        failed = run_together(commands(attempt))
        if not failed:
            return
        # Signals first: who lost its peer to one may have exited by itself by now.
        order = sorted(failed, key=failed.__getitem__)
        fates = "; ".join(f"worker {i} {fate(failed[i])}" for i in order)
        print(f"Launcher: {fates}; the others are ended.", flush=True)
        if attempt < restarts:
            print(f"Launcher: restart {attempt + 1} of {restarts}.", flush=True)
    sys.exit(f"Launcher: gave up after {restarts} restarts.")


def run_together(commands: list[list[str]]) -> dict[int, int]:
    """Run all until all succeed or one fails: the codes of those that failed.

    No process is left, however this function is left.
    """
    workers: list[subprocess.Popen] = []
    try:
        for command in commands:
            # In a group of its own: Ctrl-C goes to the launcher, which ends them.
            workers.append(subprocess.Popen(command, process_group=0))
        while True:
            codes = [worker.poll() for worker in workers]
            failed = {i: code for i, code in enumerate(codes) if code}
            if failed or None not in codes:
                return failed
            time.sleep(0.05)
    finally:
        end(workers)
        Console().show_cursor()  # a progress bar that was killed has left it hidden


def end(workers: list[subprocess.Popen], grace: float = 5.0) -> None:
    """SIGTERM to those that run; SIGKILL to those that still do after the grace."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + grace
    try:
        while None in [w.poll() for w in workers] and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def fate(code: int) -> str:
    """How a process with this return code ended."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"


def end_with(launcher: int) -> None:
    """In a worker: end as soon as the launcher is gone, even if by SIGKILL."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
