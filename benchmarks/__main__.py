"""Benchmark jaxbn versus other libraries: speed, compile time, memory, accuracy.

Everything runs on the CPU, in rounds that interleave all libraries.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from . import (
    _accuracy,
    _compile,
    _drift,
    _ensemble,
    _growth,
    _layers,
    _masks,
    _memory,
    _plots,
    _report,
    _step,
)
from ._libraries import LIBRARIES, available
from ._machine import flags, machine, versions
from ._session import Session
from ._torch import LAYOUTS, Torch

SECTIONS = {
    "accuracy": _accuracy,
    "drift": _drift,
    "memory": _memory,
    "compile": _compile,
    "step": _step,
    "growth": _growth,
    "ensemble": _ensemble,
    "masks": _masks,
    "layers": _layers,  # last, because it ends with the summary
}
HERE = Path(__file__).parent


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    names = [*LIBRARIES, *LAYOUTS]
    parser.add_argument(
        "--quick", action="store_true", help="a small run, below a minute"
    )
    parser.add_argument(
        "--only",
        type=_list_of(SECTIONS),
        default=[*SECTIONS],
        metavar="A,B",
        help=f"sections to run: {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--libraries",
        type=_list_of(names),
        default=names,
        metavar="A,B",
        help=f"libraries to run: {', '.join(names)}",
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, help="an interpreter that has torch"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random arrays")
    parser.add_argument(
        "--write-readme",
        action="store_true",
        help="update the short tables in benchmarks/README.md",
    )
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = HERE / "results" / ("quick" if args.quick else "")
    return args


def _list_of(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(
                f"there is no {', '.join(unknown)}; choose from {', '.join(known)}"
            )
        return chosen

    return names


def start_session(args: argparse.Namespace, console: Console) -> tuple[Session, dict]:
    """Return the session, and the metadata that every result carries."""
    jax.config.update("jax_platforms", "cpu")
    libraries, missing = available([n for n in args.libraries if n in LIBRARIES])
    layouts = [name for name in args.libraries if name in LAYOUTS]
    torch = Torch(args.torch_python) if layouts else None
    if torch is not None and torch.missing:
        missing["torch"] = torch.missing
        torch = None
    found = versions() | ({"torch": torch.version} if torch is not None else {})
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}")
    metadata = {
        "quick": args.quick,
        "seed": args.seed,
        "machine": machine(),
        "versions": found,
        "flags": flags(),
        "missing": missing,
    }
    rng = np.random.default_rng(args.seed)
    session = Session(args.quick, args.seed, rng, console, libraries, torch, layouts)
    return session, metadata


def main(argv: list[str] | None = None) -> None:
    """Run the sections in order; each one writes JSON, tables and plots."""
    args, console = parse_arguments(argv), Console()
    if not console.is_terminal:
        console = Console(width=150)  # fits a table of ten libraries
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    session, metadata = start_session(args, console)
    try:
        for name, section in SECTIONS.items():
            if name in args.only:
                command = f"python -m benchmarks --only {name}"
                head = {"section": name, "command": command, **metadata}
                data = head | section.run(session)
                _report.save(data, args.output)
                _plots.save(data, args.output)
                _report.show(data, console)
    finally:
        if session.torch is not None:
            session.torch.close()
    if args.write_readme:
        _report.write_readme(HERE / "README.md", args.output)
    console.print(f"{time.perf_counter() - start:.0f} s; JSON, tables and plots in")
    console.print(args.output)


if __name__ == "__main__":
    main()
