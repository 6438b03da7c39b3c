"""Folding for nnx: a copy of the model without the batch norms that were folded."""

from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from .._core.variables import BatchNormParams, BatchNormState
from .._flax.folding import (
    add_layer_note,
    check_axis_is_last,
    check_foldable,
    check_not_empty,
    uses_call_of,
)
from .._flax.paths import Path, PathKey, join, split
from .._inference.folding import fold as fold_layer
from ._batch_norm import BatchNorm
from ._bridge import bridges
from ._graph import get, iterate, put

Model = TypeVar("Model")
Layer = nnx.Linear | nnx.LinearGeneral | nnx.Conv | nnx.ConvTranspose
LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose)
NORMS = (nnx.BatchNorm, BatchNorm)


def fold(model: Model, pairs: Mapping[PathKey, str | Path] | None = None) -> Model:
    """Fold batch norms into the layers before them, in a copy of an nnx model.

    **Arguments**

    - `model`: a module, or lists, dicts and other pytrees of modules. It is not
      changed.
    - `pairs`: `{layer: norm}`, their attribute paths, as `"blocks/0/conv"`, as
      `"blocks.0.conv"` or as tuples. The model must call the norm, and nothing else, on
      the layer's output, and call the layer at this path once: the modules do not show
      it. Without `pairs`: every batch norm that directly follows a layer in an
      `nnx.Sequential`, wherever in the model that is; other batch norms stay.

    The layers are Flax's `Linear`, `LinearGeneral`, `Conv` and `ConvTranspose`, the
    norms Flax's or jaxbn's.

    **Returns** the new model, for inference only. It has the same paths: at the path of
    a folded batch norm is a module that returns its input. Each layer has a bias, and
    kernel and bias in float32 or wider; a layer that has a `dtype` still computes in
    it, and so rounds y to it. At every other path, a layer that was folded at one path
    is unfolded.

    **Raises** `ValueError` if there is nothing to fold, for a path that does not exist,
    for a batch norm whose `axis` is not -1, and as `jaxbn.fold` does; `TypeError` if
    `pairs` names other kinds of modules, among them subclasses with their own
    `__call__` and the layers of a linen model in a `flax.nnx.bridge.ToNNX`.

    >>> import jax, jax.numpy as jnp, jaxbn.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> conv = nnx.Conv(2, 3, (3, 3), use_bias=False, rngs=rngs)
    >>> model = nnx.Sequential(conv, nnx.BatchNorm(3, rngs=rngs), nnx.relu)
    >>> model.eval()
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 5, 2))
    >>> folded = jaxbn.nnx.fold(model)
    >>> jnp.allclose(folded(x), model(x), atol=1e-6)
    Array(True, dtype=bool)
    >>> folded.layers[0].bias.shape, type(folded.layers[1]).__name__
    ((3,), 'FoldedBatchNorm')
    """
    model = nnx.clone(model, graph=True)
    if pairs is None:
        paths = [*_pairs_in_sequentials(model)]
    else:
        paths = [(split(layer), split(norm)) for layer, norm in pairs.items()]
    check_not_bridged(model, paths)
    check_not_empty(paths)
    for layer, norm in paths:
        with add_layer_note(layer, norm):
            put(model, layer, _fold_pair(get(model, layer), get(model, norm)))
    for _, norm in paths:
        put(model, norm, FoldedBatchNorm())
    return model


def check_not_bridged(model: object, paths: Collection[tuple[Path, Path]]) -> None:
    """Check that the layers to fold are not linen's, in a `ToNNX`."""
    to_fold = [f"{join(path)}/" for pair in paths for path in pair]
    for bridge in map(join, bridges(model)):
        inside = [p for p in to_fold if not bridge or p.startswith(f"{bridge}/")]
        if inside or not paths:
            raise TypeError(
                "fold takes layers of nnx, not those of a linen model in a ToNNX; got "
                f"the ToNNX at the path {bridge!r}. Call jaxbn.linen.fold(variables, "
                "pairs), variables = {'params': nnx.to_pure_dict(nnx.state(bridge, "
                "nnx.Param)), 'batch_stats': nnx.to_pure_dict(nnx.state(bridge, "
                "nnx.BatchStat))}, and apply the linen model to the result within "
                "jaxbn.linen.skip_folded()."
            )


class FoldedBatchNorm(nnx.Module):
    """Return the input, at the path of a batch norm that was folded."""

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> Array:
        """Return `x`; the other arguments are a batch norm's, and have no effect."""
        return x

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Accept a batch norm's option in `nnx.view`; it has no effect."""


def _pairs_in_sequentials(model: object) -> Iterator[tuple[Path, Path]]:
    """Yield the paths of each layer and the batch norm after it in a Sequential.

    A Sequential with its own `__call__` is left out: it may call both in another way.
    """
    for path, node in iterate(model):
        if isinstance(node, nnx.Sequential) and uses_call_of(node, (nnx.Sequential,)):
            for i, (layer, norm) in enumerate(pairwise(node.layers)):
                if uses_call_of(layer, LAYERS) and uses_call_of(norm, NORMS):
                    yield (*path, "layers", i), (*path, "layers", i + 1)


def _fold_pair(layer: object, norm: object) -> Layer:
    """Return a copy of `layer` that includes `norm`."""
    layer = nnx.clone(check_foldable(layer, LAYERS))
    norm = check_foldable(norm, NORMS)
    check_axis_is_last(norm.axis)
    optional = (layer.bias, norm.scale, norm.bias)
    bias, scale, shift = (None if part is None else part[...] for part in optional)
    kernel, bias = fold_layer(
        layer.kernel[...],
        bias,
        BatchNormParams(scale, shift),
        BatchNormState(norm.mean[...], norm.var[...], jnp.float32(0)),
        epsilon=norm.epsilon,
        axis=-2 if getattr(layer, "transpose_kernel", False) else -1,
    )
    layer.kernel.set_value(kernel)
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(_bias_for(layer, bias)), True
    else:
        layer.bias.set_value(bias)
    return layer


def _bias_for(layer: Layer, bias: Array) -> Array:
    """Broadcast a bias to the shape of the layer's: more axes for `LinearGeneral`."""
    if not isinstance(layer, nnx.LinearGeneral):
        return bias
    return jnp.broadcast_to(bias, (*layer.batch_axis.values(), *layer.out_features))
