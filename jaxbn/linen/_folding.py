"""Folding for linen: a variable tree without batch norm, and the model as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from .._core.variables import BatchNormParams, BatchNormState
from .._inference.folding import fold as fold_layer
from .._inference.folding_checks import check_some, check_there, naming
from ._batch_norm import BatchNorm

Path = tuple[str, ...]
LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvLocal, nn.ConvTranspose)
NORM = (
    ("params", "scale"),
    ("params", "bias"),
    ("batch_stats", "mean"),
    ("batch_stats", "var"),
    ("batch_stats", "count"),
)


def fold(
    variables: Mapping[str, Any],
    pairs: Mapping[Any, str | Path],
    *,
    epsilon: float = 1e-5,
    axis: int | Sequence[int] = -1,
) -> dict[str, Any]:
    """Fold batch norms of a linen model into the layers before them, by their paths.

    **Arguments**

    - `variables`: of the model, `params` and `batch_stats`.
    - `pairs`: `{layer: norm}`, paths in the tree as `"Block_0/Conv_0"` or as tuples.
      The model must call the norm, and nothing else, on the layer's output, and call
      the layer once: the tree does not show it. Fold layers whose `epsilon` or `axis`
      differ one after the other.
    - `epsilon`: of these batch norms.
    - `axis`: of the features in these kernels, as in `jaxbn.fold`.

    **Returns** new variables as nested dicts, those of a model that has no such batch
    norms and whose layers have a bias. Apply them to such a model, or to the one at
    hand within `skip_folded()`; outside of it Flax reports that the statistics are
    missing. Kernel and bias are in float32 or wider; where the layer has a `dtype` it
    still computes in it, and so rounds y to it. A new bias has the norm's features:
    for a `ConvLocal` or `DenseGeneral` of your own that wants more axes, broadcast it.

    **Raises** `ValueError` for paths that are not there, for variables without batch
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
    check_some(pairs)
    tree: dict[Path, Any] = flatten_dict(dict(variables))
    folded = dict(tree)
    for layer, norm in ((_parts(a), _parts(b)) for a, b in pairs.items()):
        check_there(layer, "layers with a kernel", _having(tree, "params", "kernel"))
        check_there(norm, "batch norms", _having(tree, "batch_stats", "var"))
        with naming("/".join(layer), "/".join(norm)):
            parts = _fold_pair(tree, layer, norm, epsilon=epsilon, axis=axis)
        folded.update(parts)
        for collection, name in NORM:
            folded.pop((collection, *norm, name), None)
    return unflatten_dict(folded)


def _fold_pair(
    tree: dict[Path, Any], layer: Path, norm: Path, **options: Any
) -> dict[Path, Any]:
    """The layer's new kernel and bias by their paths, boxed as they were."""
    paths = [("params", *layer, name) for name in ("kernel", "bias")]
    kernel, bias = (tree.get(path) for path in paths)
    scale, shift, mean, var, _ = (
        meta.unbox(tree.get((collection, *norm, name))) for collection, name in NORM
    )
    values = fold_layer(
        meta.unbox(kernel),
        meta.unbox(bias),
        BatchNormParams(scale, shift),
        BatchNormState(mean, var, jnp.int32(0)),
        **options,
    )
    return {
        path: value if box is None else meta.replace_boxed(box, value)
        for path, box, value in zip(paths, (kernel, bias), values, strict=True)
    }


def _having(tree: dict[Path, Any], collection: str, name: str) -> list[Path]:
    """The paths below `collection` that have a variable of this name."""
    return [p[1:-1] for p in tree if (p[0], p[-1]) == (collection, name)]


def _parts(path: str | Path) -> Path:
    return tuple(path.split("/")) if isinstance(path, str) else tuple(path)


@contextmanager
def skip_folded() -> Iterator[None]:
    """Apply variables from `fold` to the model they came from.

    A context manager, and a decorator; it acts on what is traced in this thread while
    it is entered. A `BatchNorm` without variables returns its input, and a layer with
    `use_bias=False` adds the bias it finds. All others, and `init`, are as ever.
    With `replace_batch_norm`, enter that one last.

    Source: Flax's own mechanism for this, `flax.linen.intercept_methods`.
    """
    # By function, not by class: so also where a subclass calls it through super.
    norms = {unwrap(norm.__call__) for norm in (nn.BatchNorm, BatchNorm)}
    layers = {unwrap(layer.__call__) for layer in LAYERS}

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, called = context.module, unwrap(context.orig_method.func)
        if called in norms and _is_folded(module):
            return args[0] if args else kwargs["x"]
        y = next_fun(*args, **kwargs)
        if called in layers and not module.use_bias and _has(module, "params", "bias"):
            bias = module.get_variable("params", "bias").astype(y.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y

    with nn.intercept_methods(interceptor):
        yield


def _is_folded(norm: nn.Module) -> bool:
    return not (norm.is_initializing() or _has(norm, "batch_stats", "var"))


def _has(module: nn.Module, collection: str, name: str) -> bool:
    return module.has_variable(collection, name)
