"""Read and check the arrays of a layer, and compare them with their target's."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from .._core.variables import AnyParams, BatchNormParams, BatchNormState
from ._kernels import in_flax_layout
from ._keymap import (
    AnyArray,
    Arrays,
    KeyMap,
    Vectors,
    Weights,
    describe,
    list_names,
)

Layer = tuple[AnyParams, BatchNormState]

VECTORS = ("scale", "bias", "mean", "var")


def read_layer(found: Mapping[str, Vectors], keymap: KeyMap) -> Layer:
    """Check the only layer and copy it to JAX."""
    if len(found) != 1:
        raise ValueError(
            "there must be one batch norm layer, with arrays named "
            f"{list_names(keymap.keys)}; got {len(found)}: {list_names(found)}. "
            "For a whole model use the function that ends in _tree. A layer without "
            "running statistics (track_running_stats=False) has no state to convert: "
            "start from jaxbn.init, and always pass train=True."
        )
    (arrays,) = read_norms(found, keymap).values()
    return as_layer(arrays)


def read_norms(found: Mapping[str, Vectors], keymap: KeyMap) -> dict[str, Arrays]:
    """Check batch norm layers and copy them to NumPy."""
    norms = {name: _read_norm(vectors, name) for name, vectors in found.items()}
    for name, arrays in norms.items():
        epsilon = found[name].get("epsilon", keymap.epsilon)
        _check_var(arrays["var"], epsilon, name)
    return norms


def read_weights(weights: Weights, flax: Vectors, keymap: KeyMap, name: str) -> Arrays:
    """Check another layer and copy it to NumPy, in the names and layout of `flax`.

    The kind of the layer is known from the Flax side. An array that this kind does not
    have gets a name that `check_fit` rejects.
    """
    names = keymap.names_for(flax)
    arrays = {
        names.get(key, f"unknown {key}"): array
        for key, array in read_floating(weights, name).items()
    }
    return {
        field: in_flax_layout(a, field, np.shape(flax.get(field, ())), keymap.layout)
        for field, a in arrays.items()
    }


def read_floating(weights: Weights, name: str) -> Arrays:
    """Copy a layer to NumPy, if its arrays are floating."""
    return {key: _check_floating(value, key, name) for key, value in weights.items()}


def placeholders(weights: Weights) -> Arrays:
    """Return arrays of the same shapes that use no memory."""
    return {
        key: np.broadcast_to(np.float32(0), tuple(np.shape(value)))
        for key, value in weights.items()
    }


def as_layer(arrays: Arrays) -> Layer:
    """Copy a batch norm layer to JAX."""
    params = (jnp.array(arrays[f]) if f in arrays else None for f in ("scale", "bias"))
    mean, var = (jnp.array(arrays[f]) for f in ("mean", "var"))
    count = jnp.array(arrays["count"], jnp.float32)
    return BatchNormParams(*params), BatchNormState(mean, var, count)


def as_arrays(params: AnyParams, state: BatchNormState) -> Arrays:
    """Copy a batch norm layer to NumPy, without `None`."""
    fields = params._asdict() | state._asdict()
    return {name: np.array(a) for name, a in fields.items() if a is not None}


def check_fit(name: str, arrays: Mapping[str, AnyArray], target: Vectors) -> None:
    """Check that a layer has the arrays of its target, in the same shapes."""
    new, old = (
        {field: tuple(np.shape(side[field])) for field in sorted(side)}
        for side in (arrays, target)
    )
    for shapes in (new, old):
        shapes.pop("count", None)  # some layers keep none
    if new != old:
        raise ValueError(
            f"{describe(name)} must fit its target, with the same features and kernel, "
            f"scale and bias on both sides or on none; got {new} for {old}, in Flax's "
            "names and layout. Correct the map, or build the target with the source's "
            "options."
        )


def _read_norm(vectors: Vectors, name: str) -> Arrays:
    """Return a layer's arrays, if they are valid together, with wide statistics."""
    arrays = _check_arrays(vectors, name)
    for field in ("mean", "var"):
        wide = np.promote_types(arrays[field].dtype, np.float32)
        arrays[field] = arrays[field].astype(wide)
    return arrays


def _check_arrays(vectors: Vectors, name: str) -> Arrays:
    """Return a layer's arrays in NumPy, if they are valid together."""
    _check_complete(vectors, name)
    arrays = {
        field: _check_floating(vectors[field], field, name)
        for field in VECTORS
        if field in vectors
    }
    _check_one_shape(arrays, name)
    arrays["count"] = np.asarray(vectors.get("count", 0))
    return arrays


def _check_complete(vectors: Vectors, name: str) -> None:
    """Check that a layer has both running statistics."""
    missing = {"mean", "var"} - vectors.keys()
    if missing:
        raise ValueError(
            f"{describe(name)} must have a running mean and a running variance; got no "
            f"{' and no '.join(missing)}. Is the checkpoint complete?"
        )


def _check_floating(value: AnyArray, field: str, name: str) -> np.ndarray:
    """Return `value` as a floating array."""
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError) as error:  # PyTorch: bfloat16, cuda, grad
        reason = str(error).rstrip(".")
        raise TypeError(
            f"{field} of {describe(name)} must be readable as a NumPy array; got "
            f"{type(value).__name__}: {reason}. For a PyTorch tensor pass "
            ".detach().float().cpu()."
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{field} of {describe(name)} must be floating; got {array.dtype}. "
            "Cast it first, for instance with .astype('float32')."
        )
    return array


def _check_one_shape(arrays: Arrays, name: str) -> None:
    """Check that all arrays of a layer have the features' shape."""
    shapes = {field: array.shape for field, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the vectors of {describe(name)} must have one shape, the features'; got "
            f"{shapes}. Are they all from the same layer?"
        )


def _check_var(var: np.ndarray, epsilon: float, name: str) -> None:
    """Check that a running variance with epsilon added is not negative or NaN."""
    bad = np.argwhere(~(var + epsilon >= 0))  # NaN is not >= 0
    if bad.size:
        first = tuple(bad[0].tolist())
        raise ValueError(
            f"var of {describe(name)} must not be negative or NaN; got {var[first]} at "
            f"{first}, and {len(bad)} such of {var.size}, with an epsilon of {epsilon} "
            "added. The checkpoint is broken, or this is not a variance: use another, "
            "or recompute the statistics. With a larger epsilon add it to the variance "
            "beforehand, and pass epsilon=0."
        )
