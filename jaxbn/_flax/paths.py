"""Paths of layers in a model, tuples or strings with "/" or ".", and their errors."""

import re
from collections.abc import Collection, Hashable
from typing import TypeVar

Path = tuple[str | int, ...]
PathKey = TypeVar("PathKey", bound=str | Path)  # the keys of a Mapping are invariant


def join(path: tuple[Hashable, ...]) -> str:
    """Write a path as a string: ("blocks", 0) as "blocks/0"."""
    return "/".join(map(str, path))


def split(path: str | Path) -> Path:
    """Split a string at each "/" and "."; a tuple is taken as it is."""
    return tuple(re.split("[/.]", path)) if isinstance(path, str) else tuple(path)


def find_name(path: str, existing: Collection[str]) -> str:
    """Return the only existing path that is `path` up to "." versus "/".

    A module's name may contain a ".", so `path` itself comes first. A path that does
    not exist is returned with "/".
    """
    name = join(split(path))
    alike = [p for p in existing if join(split(p)) == name]
    if path in alike:
        return path
    return alike[0] if len(alike) == 1 else name


def check_has_batch_norm(found: Collection[object], need: str) -> None:
    """Check that there is a batch norm; `need` says which, up to the word "none"."""
    if not found:
        raise ValueError(
            f"{need} none. Batch norm layers are those of Flax and of jaxbn, and of "
            "classes that inherit from them. Pass the whole model; for linen all "
            "variables, with 'batch_stats', and not 'params' alone."
        )


def path_error(path: Path, model: str) -> ValueError:
    """Return the error for a path that leads to no attribute of the model."""
    return ValueError(
        f"pairs must name attributes of the model; got {join(path)!r}, which this "
        f"{model} does not have. Write paths as 'blocks/0/conv', or as tuples."
    )
