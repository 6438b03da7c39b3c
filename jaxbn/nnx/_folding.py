"""Folding for nnx: a copy of the model in which batch norms became nothing."""

from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from .._core.variables import BatchNormParams, BatchNormState
from .._inference.folding import fold as fold_layer
from .._inference.folding_checks import (
    check_kind,
    check_last,
    check_some,
    computes_as,
    naming,
    unreachable,
)
from ._batch_norm import BatchNorm

Model = TypeVar("Model")
Path = tuple[Any, ...]  # of names and indices
LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose)


def fold(model: Model, pairs: Mapping[Any, str | Path] | None = None) -> Model:
    """A copy of an nnx model with batch norms folded into the layers before them.

    **Arguments**

    - `model`: a module, or lists, dicts and other pytrees of modules. It stays as it
      is.
    - `pairs`: `{layer: norm}`, their attribute paths, as `"blocks.0.conv"` or as
      tuples. The model must call the norm, and nothing else, on the layer's output, and
      call the layer at this path once: the modules do not show it. Without `pairs`:
      every batch norm that directly follows a layer in an `nnx.Sequential`, wherever in
      the model that is; other batch norms stay.

    The layers are Flax's `Linear`, `LinearGeneral`, `Conv` and `ConvTranspose`, the
    norms Flax's or ours.

    **Returns** the new model, for inference only. It has the same paths: where the
    batch norm was is a module that returns its input. Each layer has a bias, and kernel
    and bias in float32 or wider; a layer that has a `dtype` still computes in it, and
    so rounds y to it. What else held a folded layer still holds an unfolded one.

    **Raises** `ValueError` where there is nothing to fold, for a path that is not
    there, for a batch norm whose `axis` is not -1, and as `jaxbn.fold` does;
    `TypeError` where `pairs` names other kinds of modules, among them those with a
    `__call__` of their own.

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
    ((3,), 'Folded')
    """
    model = nnx.clone(model, graph=True)
    if pairs is None:
        places = [*_in_sequentials(model)]
    else:
        places = [(_parts(layer), _parts(norm)) for layer, norm in pairs.items()]
    check_some(places)
    for layer, norm in places:
        with naming(_name(layer), _name(norm)):
            _put(model, layer, _folded(_get(model, layer), _get(model, norm)))
    for _, norm in places:
        _put(model, norm, Folded())
    return model


class Folded(nnx.Module):
    """Where a batch norm was: returns its input, and takes a batch norm's arguments."""

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """`x`, as it is."""
        return x

    def set_view(self, use_running_average: bool | None = None) -> None:
        """For `nnx.view`: a batch norm's option, which says nothing here."""


def _in_sequentials(model: Any) -> Iterator[tuple[Path, Path]]:
    """The paths of each layer and of the batch norm next to it in an `nnx.Sequential`.

    One with a `__call__` of its own may do anything between them.
    """
    for path, node in nnx.iter_graph(model, graph=True):
        if isinstance(node, nnx.Sequential) and computes_as(node, (nnx.Sequential,)):
            for i, (layer, norm) in enumerate(pairwise(node.layers)):
                if computes_as(layer, LAYERS) and computes_as(norm, _norms()):
                    yield (*path, "layers", i), (*path, "layers", i + 1)


def _folded(layer: Any, norm: Any) -> Any:
    """A copy of `layer` that does `norm` as well."""
    check_kind(layer, LAYERS)
    check_kind(norm, _norms())
    check_last(norm.axis)
    layer = nnx.clone(layer)
    optional = (layer.bias, norm.scale, norm.bias)
    bias, scale, shift = (None if part is None else part[...] for part in optional)
    kernel, bias = fold_layer(
        layer.kernel[...],
        bias,
        BatchNormParams(scale, shift),
        BatchNormState(norm.mean[...], norm.var[...], jnp.int32(0)),
        epsilon=norm.epsilon,
        axis=-2 if getattr(layer, "transpose_kernel", False) else -1,
    )
    layer.kernel.set_value(kernel)
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(_whole(layer, bias)), True
    else:
        layer.bias.set_value(bias)
    return layer


def _whole(layer: Any, bias: Array) -> Array:
    """A bias in the shape that `layer` wants: several axes for `LinearGeneral`."""
    if not isinstance(layer, nnx.LinearGeneral):
        return bias
    return jnp.broadcast_to(bias, (*layer.batch_axis.values(), *layer.out_features))


def _norms() -> tuple[type, ...]:

    return nnx.BatchNorm, BatchNorm


def _parts(path: str | Path) -> Path:
    return tuple(path.split(".")) if isinstance(path, str) else tuple(path)


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _get(model: Any, path: Path) -> Any:
    """What is at `path`, by attributes, and by items of lists and dicts."""
    try:
        return reduce(_child, path, model)
    except (AttributeError, LookupError, ValueError) as error:
        raise unreachable(_name(path), type(model).__name__) from error


def _child(holder: Any, key: Any) -> Any:
    if isinstance(holder, list | tuple):
        return holder[int(key)]
    return holder[key] if isinstance(holder, dict) else getattr(holder, str(key))


def _put(model: Any, path: Path, value: Any) -> None:
    """Put `value` at `path`, and only there."""
    holder, key = _get(model, path[:-1]), path[-1]
    if isinstance(holder, list):
        holder[int(key)] = value
    elif isinstance(holder, dict):
        holder[key] = value
    else:
        setattr(holder, str(key), value)
