"""Batch norm for Flax nnx: the layer, models swapped over, population statistics."""

from typing import Any, TypeVar

from flax import nnx

from .._core.checks import check_restorable
from ._batch_norm import BatchNorm as BatchNorm
from ._batch_norm import batch_norms, set_class
from ._folding import fold as fold
from ._mask import batch_norm_mask as batch_norm_mask
from ._population import population as population

Model = TypeVar("Model")


def replace_batch_norm(model: Model, autodiff: str = "custom_vjp") -> Model:
    """Make every `flax.nnx.BatchNorm` in `model` a `jaxbn.nnx.BatchNorm`, in place.

    **Arguments**

    - `model`: a module, or lists, dicts and other pytrees of modules. Layers of a class
      of their own that inherits from Flax's keep that class.
    - `autodiff`: as in `BatchNorm`.

    **Returns** `model`: the same object with the same layers, so that whoever shares
    them, and their Variables (an optimizer, a list), still does. `nnx.jit` traces it
    anew; copies made before, `nnx.view` and `nnx.cached_partial` among them, stay
    Flax's. `restore_batch_norm` is the way back.

    >>> import jaxbn.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.relu)
    >>> model = jaxbn.nnx.replace_batch_norm(model)
    >>> isinstance(model.layers[0], jaxbn.nnx.BatchNorm)
    True
    """
    for layer in _layers(model, nnx.BatchNorm):
        set_class(layer, BatchNorm)
        if autodiff != BatchNorm.autodiff:
            layer.autodiff = autodiff
    return model


def restore_batch_norm(model: Model) -> Model:
    """Make every `jaxbn.nnx.BatchNorm` in `model` a `flax.nnx.BatchNorm`, in place.

    **Returns** `model`, as `replace_batch_norm` does; subclasses of ours stay as well.

    **Raises** `ValueError`, and changes nothing, where a layer has `momentum=None` or
    `unbiased=True`: Flax has neither.

    >>> import jaxbn.nnx
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> type(jaxbn.nnx.restore_batch_norm(layer)) is nnx.BatchNorm
    True
    """
    layers = _layers(model, BatchNorm)
    for layer in layers:
        check_restorable(layer.momentum, layer.unbiased, hasattr(layer, "count"))
    for layer in layers:
        for name in {"unbiased", "autodiff"} & vars(layer).keys():
            delattr(layer, name)
        set_class(layer, nnx.BatchNorm)
    return model


def _layers(model: Any, kind: type) -> list[Any]:
    """The layers of exactly this `kind`, each once however often it is shared."""
    return [layer for layer in batch_norms(model).values() if type(layer) is kind]
