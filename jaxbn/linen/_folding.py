"""Folding for linen: a variable tree without batch norm, for an unchanged model."""

from collections.abc import Mapping

from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from .._core.variables import BatchNormParams, BatchNormState
from .._flax.paths import Path, PathKey, check_has_batch_norm, join
from .._fold.checks import (
    add_layer_note,
    check_not_empty,
    check_path_exists,
    warn_unfolded,
)
from .._fold.marks import Mark
from .._fold.pairs import Fold, check_pairs, choose_folds
from .._fold.stacks import fold_stacks
from .._fold.weights import LAYER_WEIGHTS
from ._trace import trace_model
from ._tree import Variables, batch_norm_paths, find_path, paths_with, rebuild_like

NORM_VARIABLES = (
    *(("params", name) for name in BatchNormParams._fields),
    *(("batch_stats", name) for name in BatchNormState._fields),
)


def fold(
    model: nn.Module,
    variables: Variables,
    *args: PyTree,
    pairs: Mapping[PathKey, str | Path] | None = None,
    **kwargs: PyTree,
) -> Variables:
    """Fold the batch norms of a linen model into the layers before or after them.

    One abstract call, `model.apply(variables, *args, **kwargs)`, shows which arrays go
    where: no array is computed. A batch norm is folded into the linear layer before it
    if the output of this layer has no other use, and otherwise into the linear layers
    after it if its own output has no other use, and if they do not pad with zeros.
    The formulas are at `jaxbn.fold`. Layers in one `nn.scan` or `nn.vmap` are folded
    stack by stack; nested stacks stay.

    The folded model gives the same output, in the same dtype. Only layers and norms
    that compute what Flax's do with their variables are folded: the call shows it.

    **Arguments**

    - `model`, `variables`: as for `model.apply`. Layers are Flax's `Dense`,
      `DenseGeneral`, `Conv`, `ConvLocal` and `ConvTranspose`, batch norms Flax's and
      jaxbn's, and layers of classes that inherit from these.
    - `args`, `kwargs`: of a call at inference, `train=False` for instance; arrays may
      be `jax.ShapeDtypeStruct`.
    - `pairs`: `{layer: norm}`, to fold only these: paths in the tree as
      `"Block_0/Conv_0"`, as `"Block_0.Conv_0"` or as tuples.

    **Returns** new variables in containers of the same kinds: the variables of a model
    without these batch norms, whose layers have a bias. Apply them to such a model, or
    to the original model within `skip_folded()`; outside of it Flax reports that the
    statistics are missing. Kernel and bias are in float32 or wider, or in the kernel's
    dtype where y would otherwise be wider; a layer that has a `dtype` still computes in
    it, and so rounds y to it. A new bias has the norm's
    features: for a new `ConvLocal` or `DenseGeneral`, whose bias has more axes,
    broadcast it.

    **Warns** with the path and the reason of each batch norm that stays.

    **Raises** `ValueError` for `pairs` that the model does not compute, for paths that
    do not exist, for variables without batch norm, and as `jaxbn.fold` does.
    `variables` are never changed.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
    >>> model = nn.Sequential([nn.Conv(3, (3, 3), use_bias=False), nn.BatchNorm(True)])
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 5, 2))
    >>> variables = model.init(jax.random.key(1), x)
    >>> folded = jaxbn.linen.fold(model, variables, x)
    >>> jax.tree.map(jnp.shape, folded)
    {'batch_stats': {}, 'params': {'layers_0': {'bias': (3,), 'kernel': (3, 3, 2, 3)}}}
    >>> with jaxbn.linen.skip_folded():
    ...     y = model.apply(folded, x)
    >>> jnp.allclose(y, model.apply(variables, x), atol=1e-6)
    Array(True, dtype=bool)
    """
    _check_model(model)
    norms = batch_norm_paths(variables.get("batch_stats", {}))
    named = None if pairs is None else _find_pairs(variables, pairs, norms)
    need = "fold needs the variables of batch norms in 'batch_stats'; found"
    check_has_batch_norm(norms, need)
    trace, of_nnx = trace_model(model, variables, args, kwargs)
    if named is not None:
        return _fold_all(variables, check_pairs(trace, named))
    # `skip_folded` skips the batch norms of linen alone.
    of_linen = [path for path in map(join, norms) if path not in of_nnx]
    folds, reasons = choose_folds(trace, of_linen)
    reason = "it is of an nnx module; fold the module with jaxbn.nnx.fold"
    warn_unfolded(reasons | dict.fromkeys(sorted(of_nnx), reason))
    return _fold_all(variables, folds)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            "fold takes the model, its variables and the arguments of a call: "
            f"fold(model, variables, x, train=False); got {type(model).__name__} as "
            "the model."
        )


def _find_pairs(
    variables: Variables, pairs: Mapping[PathKey, str | Path], norms: list[Path]
) -> list[tuple[str, str]]:
    """Return the pairs of a user by the paths in the tree."""
    check_not_empty(pairs)
    check_has_batch_norm(norms, "pairs must name batch norms of the model. There are:")
    layers = paths_with(variables.get("params", {}), "kernel")
    named = []
    for layer, norm in pairs.items():
        layer, norm = find_path(layer, layers), find_path(norm, norms)
        check_path_exists(layer, "layers with a kernel", layers)
        check_path_exists(norm, "batch norms", norms)
        named.append((join(layer), join(norm)))
    return named


def _fold_all(variables: Variables, folds: list[Fold]) -> Variables:
    """Return the variables with all folds, in the same kinds of containers."""
    flat = flatten_dict(dict(variables), keep_empty_nodes=True)
    modules: dict[str, Path] = {join(path[1:-1]): path[1:-1] for path in flat}
    for fold in folds:
        with add_layer_note(fold.layer, fold.norm):
            flat |= _fold_pair(flat, modules, fold)
    for fold in folds:
        for collection, name in NORM_VARIABLES:
            flat.pop((collection, *modules[fold.norm], name), None)
    emptied = {collection: {} for collection in variables}
    return rebuild_like(emptied | unflatten_dict(flat), variables)


def _fold_pair(
    tree: Mapping[Path, PyTree], modules: Mapping[str, Path], fold: Fold
) -> dict[Path, PyTree]:
    """Return the layer's new kernel and bias by their paths, boxed as before."""
    paths = [("params", *modules[fold.layer], name) for name in LAYER_WEIGHTS]
    boxes = [tree.get(path) for path in paths]
    norm = {
        name: meta.unbox(tree[collection, *modules[fold.norm], name])
        for collection, name in NORM_VARIABLES
        if Mark(name, fold.norm) in fold.stacks
    }
    kernel, bias = map(meta.unbox, boxes)
    values = fold_stacks(fold, kernel, bias, norm)
    return {
        path: value if box is None else meta.replace_boxed(box, value)
        for path, box, value in zip(paths, boxes, values, strict=True)
    }
