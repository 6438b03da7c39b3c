"""Checks of the models and paths that are given to `fold`, and its warning."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from .._flax.paths import Path, join

Kind = TypeVar("Kind")


class NotFoldableError(ValueError):
    """The reason why a batch norm cannot be folded."""


@contextmanager
def add_layer_note(layer: str, norm: str) -> Iterator[None]:
    """Add a note to any error that names the two layers: a model has dozens."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(f"While folding the batch norm {norm!r} into {layer!r}.")
        raise


def check_not_empty(pairs: Collection[object]) -> None:
    """Check that there is a pair to fold."""
    if not pairs:
        raise ValueError(
            "found no layer with a batch norm to fold into it; got a model, or pairs, "
            "without one. Only a batch norm directly after or before a linear layer "
            "can be folded; pairs={layer: norm} restricts fold to some of them."
        )


def check_path_exists(path: Path, kind: str, existing: Collection[Path]) -> None:
    """Check that `path` is one of the `existing` ones, all of this `kind`."""
    if path not in existing:
        raise ValueError(
            f"pairs must name {kind} of the model; got {join(path)!r}. There are: "
            f"{', '.join(repr(join(p)) for p in existing) or 'none'}."
        )


def check_foldable(value: object, kinds: tuple[type[Kind], ...]) -> Kind:
    """Return `value` if it is of one of `kinds`, with the same `__call__`."""
    if isinstance(value, kinds) and uses_call_of(value, kinds):
        return value
    raise TypeError(
        f"only {', '.join(kind.__name__ for kind in kinds)} of Flax or jaxbn, with "
        f"their own __call__, can be folded; got {type(value).__name__}."
    )


def uses_call_of(value: object, kinds: tuple[type, ...]) -> bool:
    """Return whether `value` has the `__call__` of one of `kinds`."""
    return type(value).__call__ in {kind.__call__ for kind in kinds}


def warn_unfolded(reasons: Mapping[str, str]) -> None:
    """Warn with the path of each batch norm that stays, and the reason."""
    if reasons:
        lines = "".join(f"\n  {path}: {why}" for path, why in reasons.items())
        warnings.warn(f"fold left batch norms as they are:{lines}", stacklevel=3)
