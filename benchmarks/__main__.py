"""Benchmark jaxbn beside its peers: speed, growth, memory, accuracy.

Everything runs on the CPU, in rounds that interleave all peers.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from . import _accuracy, _growth, _layers, _memory, _plots, _report, _step
from ._machine import flags, machine, versions
from ._peers import PEERS, available
from ._session import Session
from ._torch import LAYOUTS, Torch

SECTIONS = {
    "accuracy": _accuracy,
    "memory": _memory,
    "step": _step,
    "growth": _growth,
    "layers": _layers,  # its summary comes last
}
HERE = Path(__file__).parent


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What the command was given."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    names = [*PEERS, *LAYOUTS]
    parser.add_argument("--quick", action="store_true", help="small: below a minute")
    parser.add_argument(
        "--only",
        type=_listed(SECTIONS),
        default=[*SECTIONS],
        metavar="A,B",
        help=f"of {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--peers",
        type=_listed(names),
        default=names,
        metavar="A,B",
        help=f"of {', '.join(names)}",
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, help="an interpreter that has torch"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument(
        "--write-readme", action="store_true", help="put the tables into the README"
    )
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = HERE / "results" / ("quick" if args.quick else "")
    return args


def _listed(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(
                f"there is no {', '.join(unknown)}; choose of {', '.join(known)}"
            )
        return chosen

    return names


def start(args: argparse.Namespace, console: Console) -> tuple[Session, dict]:
    """The session, and what every result says of how it was made."""
    jax.config.update("jax_platforms", "cpu")
    peers, missing = available([name for name in args.peers if name in PEERS])
    layouts = [name for name in args.peers if name in LAYOUTS]
    torch = Torch(args.torch_python) if layouts else None
    if torch is not None and torch.missing:
        missing["torch"] = torch.missing
        torch = None
    found = versions() | ({"torch": torch.version} if torch is not None else {})
    for name, reason in missing.items():
        console.print(f"missing: {name}: {reason}")
    about = {
        "quick": args.quick,
        "seed": args.seed,
        "machine": machine(),
        "versions": found,
        "flags": flags(),
        "missing": missing,
    }
    rng = np.random.default_rng(args.seed)
    session = Session(args.quick, args.seed, rng, console, peers, torch, layouts)
    return session, about


def main(argv: list[str] | None = None) -> None:
    """Run the sections one after the other; each leaves JSON, tables and pictures."""
    args, console = arguments(argv), Console()
    if not console.is_terminal:
        console = Console(width=150)  # where a table of ten peers fits
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    session, about = start(args, console)
    try:
        for name, section in SECTIONS.items():
            if name in args.only:
                command = f"python -m benchmarks --only {name}"
                head = {"section": name, "command": command, **about}
                data = head | section.run(session)
                _report.save(data, args.output)
                _plots.save(data, args.output)
                _report.show(data, console)
    finally:
        if session.torch is not None:
            session.torch.close()
    if args.write_readme:
        _report.write_readme(HERE / "README.md", args.output)
    console.print(f"{time.perf_counter() - began:.0f} s; JSON, tables and pictures in")
    console.print(args.output)


if __name__ == "__main__":
    main()
