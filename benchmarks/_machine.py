"""Describe the machine and the software of a result, without hosts or paths."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "jaxbn", "flax", "dm-haiku", "equinox", "keras", "numpy")
FLAGS = ("XLA_FLAGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MALLOC_ARENA_MAX")


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict:
    """Return the cores, the CPU model, the system and the Python version."""
    return {
        "cores": cores(),
        "cpu": _cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    extensions = sorted(set(re.findall(r"\b(avx2|avx512f|amx_bf16)\b", text)))
    name = model[1] if model else platform.processor() or "unknown"
    return " ".join([name, *extensions])


def versions() -> dict[str, str]:
    """Return the version of each benchmarked package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def flags() -> dict[str, str]:
    """Return the set environment variables that affect XLA and PyTorch."""
    return {name: os.environ[name] for name in FLAGS if name in os.environ}
