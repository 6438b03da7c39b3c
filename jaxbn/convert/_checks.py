"""Every complaint of the conversions: the rule, what came, what to do.

`TypeError` for dtypes and kinds of value, `ValueError` for the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

VECTORS = ("scale", "bias", "mean", "var")


def check_layer(vectors: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """A layer's arrays in NumPy, which make sense together."""
    check_complete(vectors, name)
    arrays = {
        field: check_floating(vectors[field], field, name)
        for field in VECTORS
        if field in vectors
    }
    check_one_shape(arrays, name)
    check_var(arrays["var"], name)
    if "count" in vectors:
        arrays["count"] = np.asarray(vectors["count"])
    return arrays


def check_complete(vectors: Mapping[str, Any], name: str) -> None:
    """A layer has both running statistics."""
    missing = {"mean", "var"} - vectors.keys()
    if missing:
        raise ValueError(
            f"{_layer(name)} must have a running mean and a running variance; got no "
            f"{' and no '.join(missing)}. Is the checkpoint complete?"
        )


def check_floating(value: Any, field: str, name: str) -> np.ndarray:
    """`value` as a floating array."""
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError) as error:  # PyTorch's: bfloat16, cuda, grad
        raise TypeError(
            f"{field} of {_layer(name)} must be readable as a NumPy array; got "
            f"{type(value).__name__}: {error} Of a tensor pass "
            ".detach().float().cpu()."
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{field} of {_layer(name)} must be floating; got {array.dtype}. "
            "Cast it first, for instance with .astype('float32')."
        )
    return array


def check_one_shape(arrays: Mapping[str, np.ndarray], name: str) -> None:
    """All vectors of a layer have the features' shape."""
    shapes = {field: array.shape for field, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the vectors of {_layer(name)} must have one shape, the features'; got "
            f"{shapes}. Are they of the same layer?"
        )


def check_var(var: np.ndarray, name: str) -> None:
    """A running variance is one."""
    bad = np.argwhere(~(var >= 0))  # NaN too
    if bad.size:
        first = tuple(bad[0].tolist())
        raise ValueError(
            f"var of {_layer(name)} must not be negative or NaN; got {var[first]} at "
            f"{first}, and {len(bad)} such of {var.size}. The checkpoint is broken, or "
            "this is not a variance: take another, or estimate the statistics anew."
        )


def check_single(found: Iterable[str], keys: Iterable[str]) -> None:
    """One layer was given where one is wanted."""
    names = list(found)
    if len(names) != 1:
        raise ValueError(
            f"one batch norm layer is wanted, with arrays named {_some(keys)}; got "
            f"{len(names)}: {_some(names)}. For a whole model take the function that "
            "ends in _tree. A layer that keeps no running statistics "
            "(track_running_stats=False) has no state to convert: start from "
            "jaxbn.init, with train=True always."
        )


def check_length(weights: Sequence[Any], keys: Sequence[str]) -> Sequence[Any]:
    """A list of weights holds what the layer's options say."""
    if len(weights) != len(keys):
        raise ValueError(
            f"a list of weights must hold {_some(keys)}; got {len(weights)} arrays. "
            "Pass scale=False, center=False as the layer has them, or a dict."
        )
    return weights


def check_flat(value: Any, field: str, name: str) -> Any:
    """A vector along one axis, without the others: (1, 1, 1, C) becomes (C,)."""
    shape = np.shape(value)
    if sum(length > 1 for length in shape) > 1:
        raise ValueError(
            f"{field} of {_layer(name)} must be long in one axis, the features'; got "
            f"shape {shape}. Convert layers that keep several axes by hand, with "
            "jaxbn.BatchNormParams and BatchNormState."
        )
    return value.reshape(-1) if shape else value


def check_once(names: Mapping[str, str]) -> None:
    """The map gives no layer of ours twice."""
    ours = list(names.values())
    doubled = {name: [k for k, v in names.items() if v == name] for name in ours}
    doubled = {name: keys for name, keys in doubled.items() if len(keys) > 1}
    if doubled:
        raise ValueError(
            f"names must give each layer once; got {doubled}. Map each name to a layer "
            "of its own."
        )


def check_names(
    names: Mapping[str, str], theirs: Iterable[str], ours: Iterable[str]
) -> None:
    """The map holds each batch norm layer of both sides, and nothing else."""
    _check_side("the other library's model", "keys", names.keys(), theirs)
    _check_side("our variables", "values", names.values(), ours)


def _check_side(
    side: str, part: str, given: Iterable[str], there: Iterable[str]
) -> None:
    given, there = set(given), set(there)
    if unknown := given - there:
        raise ValueError(
            f"the {part} of names must be batch norm layers of {side}; got "
            f"{_some(unknown)}, and there are {_some(there)}. Correct the map."
        )
    if missed := there - given:
        raise ValueError(
            f"names must map every batch norm layer; its {part} leave out "
            f"{_some(missed)} of {side}. Add it to the map, or take it out of what you "
            "pass."
        )


def check_known(layers: Iterable[str], targets: Iterable[str]) -> None:
    """The layers to replace are there."""
    if unknown := set(layers) - set(targets):
        raise ValueError(
            "the layers to replace must be batch norm layers of the variables; got "
            f"{_some(unknown)}, and there are {_some(targets)}. Take the paths that "
            "layers_of returns."
        )


def check_fit(name: str, vectors: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """A layer has what its target has, in the same shapes."""
    new, old = (
        {field: np.shape(side[field]) for field in VECTORS if field in side}
        for side in (vectors, target)
    )
    if new != old:
        raise ValueError(
            f"{_layer(name)} must fit its target, with the same features and scale and "
            f"bias on both sides or on none; got {new} for {old}. Correct the map, or "
            "build the target with the source's options."
        )


def check_counted(count: Any, name: str) -> int:
    """Some batches were absorbed, as many as the debiasing wants to know."""
    if int(count) < 1:
        raise ValueError(
            f"{_layer(name)} must have absorbed a batch, for the averages are debiased "
            f"by the count; got count={int(count)}. Layers of Flax keep no count: "
            "pass count=, or state._replace(count=...), the number of training steps."
        )
    return int(count)


def check_begun(first_time: Any, name: str) -> None:
    """There are statistics to convert."""
    if first_time:
        raise ValueError(
            f"{_layer(name)} must have seen a batch: in the mode 'ema' equinox has no "
            "statistics before; got a new one. Train it for a step, or start from "
            "jaxbn.init."
        )


def _layer(name: str) -> str:
    return f"layer {name!r}" if name else "the layer"


def _some(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    listed = ", ".join(map(repr, names[:most])) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
