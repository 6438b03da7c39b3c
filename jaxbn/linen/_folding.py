"""Folding for linen: a variable tree without batch norm, for an unchanged model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._core.variables import BatchNormParams, BatchNormState
from .._flax.folding import (
    add_layer_note,
    check_has_batch_norm,
    check_not_empty,
    check_path_exists,
)
from .._flax.paths import Path, PathKey, join
from .._inference.folding import fold as fold_layer
from ._batch_norm import BatchNorm
from ._bridge import intercept_bridges
from ._intercept import NextCall, intercept_calls
from ._tree import batch_norm_paths, find_path, paths_with

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvLocal, nn.ConvTranspose)
NORMS = (nn.BatchNorm, BatchNorm)
NORM_VARIABLES = (
    *(("params", name) for name in BatchNormParams._fields),
    *(("batch_stats", name) for name in BatchNormState._fields),
)


def fold(
    variables: Mapping[str, PyTree],
    pairs: Mapping[PathKey, str | Path],
    *,
    epsilon: float = 1e-5,
    axis: int | Sequence[int] = -1,
) -> dict[str, PyTree]:
    """Fold batch norms of a linen model into the layers before them, by their paths.

    **Arguments**

    - `variables`: of the model, `params` and `batch_stats`.
    - `pairs`: `{layer: norm}`, paths in the tree as `"Block_0/Conv_0"`, as
      `"Block_0.Conv_0"` or as tuples. The model must call the norm, and nothing else,
      on the layer's output, and call the layer once: the tree does not show it. Fold
      layers whose `epsilon` or `axis` differ one after the other.
    - `epsilon`: of these batch norms.
    - `axis`: of the features in these kernels, as in `jaxbn.fold`.

    **Returns** new variables as nested dicts: the variables of a model without these
    batch norms, whose layers have a bias. Apply them to such a model, or to the
    original model within `skip_folded()`; outside of it Flax reports that the
    statistics are missing. Kernel and bias are in float32 or wider; a layer that has a
    `dtype` still computes in it, and so rounds y to it. A new bias has the norm's
    features: for a new `ConvLocal` or `DenseGeneral`, whose bias has more axes,
    broadcast it.

    **Raises** `ValueError` for paths that do not exist, for variables without batch
    norm, and as `jaxbn.fold` does. `variables` are never changed.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
    >>> model = nn.Sequential([nn.Conv(3, (3, 3), use_bias=False), nn.BatchNorm(True)])
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 5, 2))
    >>> variables = model.init(jax.random.key(1), x)
    >>> folded = jaxbn.linen.fold(variables, {"layers_0": "layers_1"})
    >>> jax.tree.map(jnp.shape, folded)
    {'params': {'layers_0': {'bias': (3,), 'kernel': (3, 3, 2, 3)}}}
    >>> with jaxbn.linen.skip_folded():
    ...     y = model.apply(folded, x)
    >>> jnp.allclose(y, model.apply(variables, x), atol=1e-6)
    Array(True, dtype=bool)
    """
    check_not_empty(pairs)
    layers = paths_with(variables.get("params", {}), "kernel")
    norms = batch_norm_paths(variables.get("batch_stats", {}))
    check_has_batch_norm(norms, "pairs must name batch norms of the model. There are:")
    tree: dict[Path, PyTree] = flatten_dict(dict(variables))
    folded = dict(tree)
    for layer, norm in pairs.items():
        layer, norm = find_path(layer, layers), find_path(norm, norms)
        check_path_exists(layer, "layers with a kernel", layers)
        check_path_exists(norm, "batch norms", norms)
        with add_layer_note(layer, norm):
            folded |= _fold_pair(tree, layer, norm, epsilon, axis)
        for collection, name in NORM_VARIABLES:
            folded.pop((collection, *norm, name), None)
    return unflatten_dict(folded)


def _fold_pair(
    tree: Mapping[Path, PyTree],
    layer: Path,
    norm: Path,
    epsilon: float,
    axis: int | Sequence[int],
) -> dict[Path, PyTree]:
    """Return the layer's new kernel and bias by their paths, boxed as before."""
    paths: list[Path] = [("params", *layer, name) for name in ("kernel", "bias")]
    kernel, bias = (tree.get(path) for path in paths)
    scale, shift, mean, var, _ = (
        meta.unbox(tree.get((collection, *norm, name)))
        for collection, name in NORM_VARIABLES
    )
    values = fold_layer(
        meta.unbox(kernel),
        meta.unbox(bias),
        BatchNormParams(scale, shift),
        BatchNormState(mean, var, jnp.float32(0)),
        epsilon=epsilon,
        axis=axis,
    )
    return {
        path: value if box is None else meta.replace_boxed(box, value)
        for path, box, value in zip(paths, (kernel, bias), values, strict=True)
    }


@contextmanager
def skip_folded() -> Iterator[None]:
    """Apply variables from `fold` to the original model.

    A context manager, and a decorator; it acts on all code that is traced in this
    thread while it is entered. A `BatchNorm` without variables returns its input, and a
    layer with `use_bias=False` adds the bias that it finds. All other layers, and
    `init`, are unchanged; an nnx module in a `flax.nnx.bridge.ToLinen` that lacks the
    variables of a batch norm raises a `TypeError`. With `replace_batch_norm`, enter
    `replace_batch_norm` last.

    Source: `flax.linen.intercept_methods`, Flax's own mechanism for this purpose.
    """
    norms = intercept_calls(NORMS, _skip_norm)
    layers = intercept_calls(LAYERS, _add_bias)
    with norms, layers, intercept_bridges(_check_not_folded):
        yield


def _check_not_folded(bridge: nn.Module, module: object) -> None:
    """Check that the variables have statistics for all batch norms of an nnx module."""
    from ..nnx._bridge import all_statistics  # a circular import

    norms = batch_norm_paths(bridge.variables.get("batch_stats", {}))
    for norm in all_statistics(module):
        if norm not in norms and not bridge.is_initializing():
            raise TypeError(
                "skip_folded skips the batch norms of linen, not of an nnx module in a "
                f"ToLinen; got {type(module).__name__} at the path "
                f"{join(bridge.path)!r}, without statistics of its {join(norm)!r}. "
                "Apply the variables to a model whose nnx module is folded: "
                "nnx.bridge.to_linen(lambda rngs: jaxbn.nnx.fold(Model(rngs), pairs))."
            )


def _skip_norm(
    next_call: NextCall,
    norm: nn.Module,
    x: ArrayLike,
    *args: PyTree,
    **kwargs: PyTree,
) -> ArrayLike:
    """Return the input of a batch norm without variables."""
    if norm.is_initializing() or norm.has_variable("batch_stats", "var"):
        return next_call(x, *args, **kwargs)
    return x


def _add_bias(
    next_call: NextCall, layer: nn.Module, *args: PyTree, **kwargs: PyTree
) -> Array:
    """Add the bias that `fold` gave to a layer without one."""
    y = next_call(*args, **kwargs)
    if layer.use_bias or not layer.has_variable("params", "bias"):
        return y
    bias = layer.get_variable("params", "bias").astype(y.dtype)
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
