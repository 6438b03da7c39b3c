"""Paths of layers in a model: tuples, written as strings with "/" or "."."""

import re
from typing import TypeVar

Path = tuple[str | int, ...]
PathKey = TypeVar("PathKey", bound=str | Path)  # the keys of a Mapping are invariant


def join(path: Path) -> str:
    """Write a path as a string: ("blocks", 0) as "blocks/0"."""
    return "/".join(map(str, path))


def split(path: str | Path) -> Path:
    """Split a string at each "/" and "."; a tuple is taken as it is."""
    return tuple(re.split("[/.]", path)) if isinstance(path, str) else tuple(path)
