"""Start processes, watch them, end all when one fails, and start them again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console


def launch(commands: Callable[[int], list[list[str]]], restarts: int) -> None:
    """Run `commands(attempt)` together; restart after failures, then exit with 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    for attempt in range(restarts + 1):
        failed = run_together(commands(attempt))
        if not failed:
            return
        # Signals first: a worker that lost its peer may have exited by itself by now.
        order = sorted(failed, key=failed.__getitem__)
        fates = "; ".join(f"worker {i} {fate(failed[i])}" for i in order)
        print(f"Launcher: {fates}; all others were stopped.", flush=True)
        if attempt < restarts:
            print(f"Launcher: restart {attempt + 1} of {restarts}.", flush=True)
    sys.exit(f"Launcher: gave up after {restarts} restarts.")


def run_together(commands: list[list[str]]) -> dict[int, int]:
    """Run until all succeed or one fails; return the exit codes of failed workers.

    No process outlives this function, even if it raises.
    """
    workers: list[subprocess.Popen] = []
    try:
        for command in commands:
            # With its own group, Ctrl-C reaches only the launcher, which ends it.
            workers.append(subprocess.Popen(command, process_group=0))
        while True:
            codes = [worker.poll() for worker in workers]
            failed = {i: code for i, code in enumerate(codes) if code}
            if failed or None not in codes:
                return failed
            time.sleep(0.05)
    finally:
        end(workers)
        Console().show_cursor()  # a killed progress bar leaves it hidden


def end(workers: list[subprocess.Popen], grace: float = 5.0) -> None:
    """Send SIGTERM to running workers, and SIGKILL after `grace` seconds."""
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
    """Describe how a process with this return code ended."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"


def end_with(launcher: int) -> None:
    """End this worker as soon as its launcher is gone, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
