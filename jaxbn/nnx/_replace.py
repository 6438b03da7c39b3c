"""Flax's layers in a model, turned into jaxbn's and back."""

from typing import Literal, TypeVar

from flax import nnx

from .._core.options import check_autodiff
from ._batch_norm import BatchNorm
from ._bridge import ReplacedToNNX, bridges
from ._graph import batch_norms, replace_class, subclass

Model = TypeVar("Model")
Kind = TypeVar("Kind", bound=nnx.BatchNorm)


def replace_batch_norm(
    model: Model, *, autodiff: Literal["custom_vjp", "jax"] = "custom_vjp"
) -> Model:
    """Make every `flax.nnx.BatchNorm` in `model` a `jaxbn.nnx.BatchNorm`, in place.

    **Arguments**

    - `model`: a module, or lists, dicts and other pytrees of modules. A layer of a
      class that inherits from Flax's keeps its class. A linen model in a
      `flax.nnx.bridge.ToNNX` is called within `jaxbn.linen.replace_batch_norm`.
    - `autodiff`: as in `BatchNorm`.

    **Returns** `model`: the same object with the same layers, so that all that share
    them and their Variables (an optimizer, a list) still do. `nnx.jit` traces it anew;
    earlier copies, `nnx.view` and `nnx.cached_partial` among them, stay Flax's.
    `restore_batch_norm` is the way back.

    **Raises** `ValueError`, and changes nothing, if `autodiff` is neither of the two;
    `TypeError` for a `flax.nnx.bridge.Module` that makes its layers in each call.

    >>> import jaxbn.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.relu)
    >>> model = jaxbn.nnx.replace_batch_norm(model)
    >>> isinstance(model.layers[0], jaxbn.nnx.BatchNorm)
    True
    """
    check_autodiff(autodiff)
    for layer in _layers_of_class(model, nnx.BatchNorm):
        layer = replace_class(layer, BatchNorm)
        if autodiff != BatchNorm.autodiff:
            layer.autodiff = autodiff
    for bridge in bridges(model).values():
        if not isinstance(bridge, ReplacedToNNX):
            bridge = replace_class(bridge, subclass(type(bridge), ReplacedToNNX))
            bridge.to_nnx__autodiff = autodiff
    return model


def restore_batch_norm(model: Model) -> Model:
    """Make every `jaxbn.nnx.BatchNorm` in `model` a `flax.nnx.BatchNorm`, in place.

    **Returns** `model`, as `replace_batch_norm` does; a layer of a class that inherits
    from jaxbn's keeps its class.

    **Raises** `ValueError`, and changes nothing, if a layer has `momentum=None` or
    `unbiased=True`: Flax has neither.

    >>> import jaxbn.nnx
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> type(jaxbn.nnx.restore_batch_norm(layer)) is nnx.BatchNorm
    True
    """
    layers = _layers_of_class(model, BatchNorm)
    for layer in layers:
        check_restorable(layer.momentum, layer.unbiased, hasattr(layer, "count"))
    for layer in layers:
        for name in {"unbiased", "autodiff"} & vars(layer).keys():
            delattr(layer, name)
        replace_class(layer, nnx.BatchNorm)
    for bridge in bridges(model).values():
        if isinstance(bridge, ReplacedToNNX):
            del bridge.to_nnx__autodiff
            replace_class(bridge, type(bridge).__bases__[0])
    return model


def check_restorable(momentum: float | None, unbiased: bool, counted: bool) -> None:
    """Check that Flax's layer has all options and variables of this one."""
    if momentum is None or unbiased or counted:
        raise ValueError(
            "a layer can become flax.nnx.BatchNorm only with a momentum, no count of "
            f"batches and no unbiased; got momentum={momentum}, count={counted}, "
            f"unbiased={unbiased}. Keep jaxbn.nnx.BatchNorm for this model."
        )


def _layers_of_class(model: object, kind: type[Kind]) -> list[Kind]:
    """Return the layers of exactly this class, each once even if it is shared."""
    return [layer for layer in batch_norms(model).values() if type(layer) is kind]
