"""Folding for nnx: a copy of the model without the batch norms that were folded."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import TypeVar, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._flax.paths import Path, PathKey, join, split
from .._fold.checks import (
    add_layer_note,
    check_foldable,
    check_not_empty,
    uses_call_of,
    warn_unfolded,
)
from .._fold.pairs import Fold, check_pairs, choose_folds
from .._fold.stacks import fold_stacks
from ._bridge import bridges
from ._graph import get, iterate, replace_class
from ._trace import LAYERS, NORMS, Layer, trace_model, weights

Model = TypeVar("Model")


def fold(
    model: Model,
    *args: PyTree,
    pairs: Mapping[PathKey, str | Path] | None = None,
    **kwargs: PyTree,
) -> Model:
    """Fold batch norms into the layers before or after them, in a copy of an nnx model.

    One abstract call, `model(*args, **kwargs)`, shows which arrays go where: no array
    is computed. A batch norm is folded into the linear layer before it if the output of
    this layer has no other use, and otherwise into the linear layers after it if its
    own output has no other use, and if they do not pad with zeros. The formulas are at
    `jaxbn.fold`. Layers in one `nnx.vmap` or `nnx.scan` are folded stack by stack;
    nested stacks stay.

    The new model gives the same output, in the same dtype. Only layers and norms that
    compute what Flax's do with their variables are folded: the call shows it.

    **Arguments**

    - `model`: a module, which is not changed. Layers are Flax's `Linear`,
      `LinearGeneral`, `Conv` and `ConvTranspose`, batch norms Flax's and jaxbn's, and
      layers of classes that inherit from these and have no `__call__` of their own.
    - `args`, `kwargs`: of a call at inference, after `model.eval()` for instance;
      arrays may be `jax.ShapeDtypeStruct`.
    - `pairs`: `{layer: norm}`, to fold only these: attribute paths, as
      `"blocks/0/conv"`, as `"blocks.0.conv"` or as tuples.

    **Returns** the new model, for inference only. It has the same paths: at the path of
    a folded batch norm is a module that returns its input. Each layer has a bias, and
    kernel and bias in float32 or wider, or in the kernel's dtype where y would
    otherwise be wider; a layer that has a `dtype` still computes in it, and so rounds
    y to it.

    **Warns** with the path and the reason of each batch norm that stays.

    **Raises** `ValueError` for a model without batch norm, for `pairs` that the model
    does not compute, for a path that does not exist, and as `jaxbn.fold` does;
    `TypeError` if `pairs` names other kinds of modules, and if the only batch norms are
    in a linen model, in a `flax.nnx.bridge.ToNNX`.

    >>> import jax, jax.numpy as jnp, jaxbn.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> conv = nnx.Conv(2, 3, (3, 3), use_bias=False, rngs=rngs)
    >>> model = nnx.Sequential(conv, nnx.BatchNorm(3, rngs=rngs), nnx.relu)
    >>> model.eval()
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 5, 2))
    >>> folded = jaxbn.nnx.fold(model, x)
    >>> jnp.allclose(folded(x), model(x), atol=1e-6)
    Array(True, dtype=bool)
    >>> folded.layers[0].bias.shape, type(folded.layers[1]).__name__
    ((3,), 'FoldedBatchNorm')
    """
    _check_callable(model)
    model = nnx.clone(model, graph=True)
    nodes = {join(path): node for path, node in iterate(model)}
    if pairs is not None:
        named = _find_pairs(model, pairs, {id(n): path for path, n in nodes.items()})
        folds = check_pairs(trace_model(model, args, kwargs), named)
    else:
        folds, reasons = _choose_folds(model, nodes, args, kwargs)
        warn_unfolded(reasons)
    for fold in folds:
        with add_layer_note(fold.layer, fold.norm):
            _fold_pair(nodes, fold)
    for fold in folds:
        _remove(nodes[fold.norm])
    return model


def _check_callable(model: object) -> None:
    if not callable(model):
        raise TypeError(
            "fold calls the model, with the arguments after it: fold(model, x); got "
            f"{type(model).__name__}, which cannot be called. Pass a module that calls "
            "its parts."
        )


def _choose_folds(
    model: PyTree,
    nodes: Mapping[str, object],
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
) -> tuple[list[Fold], dict[str, str]]:
    """Return all folds of a model, and the reasons for the other batch norms."""
    norms = {p: node for p, node in nodes.items() if isinstance(node, nnx.BatchNorm)}
    known = [path for path, norm in norms.items() if uses_call_of(norm, NORMS)]
    if not known:
        check_not_bridged(model, [])
        check_not_empty(known)
    folds, reasons = choose_folds(trace_model(model, args, kwargs), known)
    if not folds:
        check_not_bridged(model, [])
    for path in norms:
        if path not in known:
            reasons[path] = f"{type(norms[path]).__name__} has a __call__ of its own"
    for path in map(join, bridges(model)):
        reasons[path] = "its layers are linen's; fold them with jaxbn.linen.fold"
    return folds, reasons


def _find_pairs(
    model: PyTree, pairs: Mapping[PathKey, str | Path], paths: Mapping[int, str]
) -> list[tuple[str, str]]:
    """Return the pairs of a user by the first path of each module."""
    named = [(split(layer), split(norm)) for layer, norm in pairs.items()]
    check_not_bridged(model, named)
    check_not_empty(named)
    found = []
    for layer, norm in named:
        with add_layer_note(join(layer), join(norm)):
            modules = (
                check_foldable(get(model, layer), LAYERS),
                check_foldable(get(model, norm), NORMS),
            )
        found.append(tuple(paths[id(module)] for module in modules))
    return found


def check_not_bridged(model: object, paths: Collection[tuple[Path, Path]]) -> None:
    """Check that the layers to fold are not linen's, in a `ToNNX`."""
    to_fold = [f"{join(path)}/" for pair in paths for path in pair]
    for bridge in map(join, bridges(model)):
        inside = [p for p in to_fold if not bridge or p.startswith(f"{bridge}/")]
        if inside or not paths:
            raise TypeError(
                "fold takes layers of nnx, not those of a linen model in a ToNNX; got "
                f"the ToNNX at the path {bridge!r}. Call jaxbn.linen.fold(model, "
                "variables, x), variables = {'params': nnx.to_pure_dict(nnx.state("
                "bridge, nnx.Param)), 'batch_stats': nnx.to_pure_dict(nnx.state("
                "bridge, nnx.BatchStat))}, and apply the linen model to the result "
                "within jaxbn.linen.skip_folded()."
            )


class FoldedBatchNorm(nnx.Module):
    """Return the input, at the path of a batch norm that was folded."""

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_statistics: bool = True,
    ) -> Array:
        """Return `x`; the other arguments are a batch norm's, and have no effect."""
        return x

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Accept a batch norm's option in `nnx.view`; it has no effect."""


def _fold_pair(nodes: Mapping[str, object], fold: Fold) -> None:
    """Include a batch norm in a layer, in place."""
    layer = cast(Layer, nodes[fold.layer])
    of_layer, of_norm = weights(layer), weights(cast(nnx.Module, nodes[fold.norm]))
    old = of_layer.get("bias")
    kernel, bias = fold_stacks(
        fold,
        of_layer["kernel"][...],
        None if old is None else old[...],
        {name: variable[...] for name, variable in of_norm.items()},
        partial(_shape_bias, layer),
    )
    # Copies: another layer may share them.
    layer.kernel = cast(nnx.Param, layer.kernel.copy(kernel))
    layer.bias = nnx.Param(bias) if old is None else cast(nnx.Param, old.copy(bias))
    layer.use_bias = True


def _remove(norm: object) -> None:
    """Turn a batch norm into a module that returns its input, wherever it is held."""
    replace_class(cast(nnx.Module, norm), FoldedBatchNorm)
    for name in [name for name in vars(norm) if not name.startswith("_")]:
        delattr(norm, name)


def _shape_bias(layer: Layer, bias: Array) -> Array:
    """Broadcast a bias to the shape of the layer's: more axes for `LinearGeneral`."""
    if not isinstance(layer, nnx.LinearGeneral):
        return bias
    return jnp.broadcast_to(bias, (*layer.batch_axis.values(), *layer.out_features))
