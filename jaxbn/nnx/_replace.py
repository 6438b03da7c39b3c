"""Flax's layers in a model, turned into jaxbn's and back."""

from collections.abc import Iterable
from typing import Literal, TypeVar

from flax import nnx
from jaxtyping import PyTree

from .._core.options import Autodiff, check_autodiff
from .._flax.layer import check_flag
from .._flax.lookalikes import check_also, check_variables, warn_not_replaced
from .._flax.paths import Path, join
from ._batch_norm import BatchNorm
from ._bridge import ReplacedToNNX, bridges
from ._graph import batch_norms, iterate, replace_class, subclass
from ._lookalikes import UnbiasedBatchNorm, original_class, replaced_class

Model = TypeVar("Model")


def replace_batch_norm(
    model: Model,
    *,
    autodiff: Literal["custom_vjp", "jax"] = "custom_vjp",
    unbiased: bool = False,
    also: Iterable[type] = (),
) -> Model:
    """Make every `flax.nnx.BatchNorm` in `model` a `jaxbn.nnx.BatchNorm`, in place.

    **Arguments**

    - `model`: a module, or lists, dicts and other pytrees of modules. A layer of a
      class that inherits from Flax's, without a `__call__` of its own, is replaced too,
      and stays an instance of its class. A linen model in a `flax.nnx.bridge.ToNNX` is
      called within `jaxbn.linen.replace_batch_norm`.
    - `autodiff`, `unbiased`: as in `BatchNorm`; `unbiased=True` is PyTorch's running
      variance.
    - `also`: other classes to replace, which have Flax's attributes and Variables, and
      are called with `x`, with `use_running_average` or `train` (`training`,
      `is_training`), and with `mask`. Attributes that they lack have Flax's defaults.

    **Returns** `model`: the same object with the same layers, so that all that share
    them and their Variables (an optimizer, a list) still do. `nnx.jit` traces it anew;
    earlier copies, `nnx.view` and `nnx.cached_partial` among them, stay Flax's.
    `restore_batch_norm` is the way back.

    **Warns** if nothing in `model` is computed by jaxbn then, and names the layers that
    have running statistics. Replaced layers are instances of `jaxbn.nnx.BatchNorm`.

    **Raises** `ValueError`, and changes nothing, if `autodiff` is neither of the two;
    `TypeError` for a `flax.nnx.bridge.Module` that makes its layers in each call, and
    for classes in `also` with other arguments or Variables.

    >>> import jaxbn.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.relu)
    >>> model = jaxbn.nnx.replace_batch_norm(model)
    >>> isinstance(model.layers[0], jaxbn.nnx.BatchNorm)
    True
    """
    check_autodiff(autodiff)
    check_flag("unbiased", unbiased)
    kinds = check_also(also)
    replace_layers(model, autodiff, unbiased, kinds)
    replace_bridges(model, autodiff, unbiased, kinds)
    replaced = (BatchNorm, ReplacedToNNX)
    if not any(isinstance(node, replaced) for _, node in iterate(model)):
        others = {join(path): kind for path, kind in other_kinds(model).items()}
        warn_not_replaced(type(model).__name__, others, stacklevel=2)
    return model


def replace_layers(
    model: PyTree, autodiff: Autodiff, unbiased: bool, also: Iterable[type]
) -> list[Path]:
    """Replace the layers in an nnx model; return their paths."""
    batch_norms(model)  # for its checks
    calls = {kind.__call__ for kind in (nnx.BatchNorm, *also)}
    parent = UnbiasedBatchNorm if unbiased else BatchNorm
    layers = {
        path: node
        for path, node in iterate(model)
        if isinstance(node, nnx.Module) and type(node).__call__ in calls
    }
    for layer in layers.values():
        if type(layer).__call__ is not nnx.BatchNorm.__call__:
            check_variables(type(layer), variable_names(layer))
    for layer in layers.values():
        layer = replace_class(layer, replaced_class(type(layer), parent))
        if autodiff != BatchNorm.autodiff:
            layer.autodiff = autodiff
    return [*layers]


def replace_bridges(
    model: PyTree, autodiff: Autodiff, unbiased: bool, also: tuple[type, ...]
) -> None:
    """Call the linen models in an nnx model within linen's `replace_batch_norm`."""
    for bridge in bridges(model).values():
        if not isinstance(bridge, ReplacedToNNX):
            bridge = replace_class(bridge, subclass(type(bridge), ReplacedToNNX))
            bridge.to_nnx__autodiff = autodiff
            bridge.to_nnx__unbiased = unbiased
            bridge.to_nnx__also = also


def other_kinds(model: PyTree) -> dict[Path, type]:
    """Return the classes of modules with running statistics that are not jaxbn's."""
    return {
        path: type(node)
        for path, node in iterate(model)
        if isinstance(node, nnx.Module)
        and not isinstance(node, BatchNorm)
        and any(isinstance(value, nnx.BatchStat) for value in vars(node).values())
    }


def variable_names(layer: nnx.Module) -> set[str]:
    """Return the names of the Variables that are a layer's own."""
    values = vars(layer).items()
    return {name for name, value in values if isinstance(value, nnx.Variable)}


def restore_batch_norm(model: Model) -> Model:
    """Make every `jaxbn.nnx.BatchNorm` in `model` a `flax.nnx.BatchNorm`, in place.

    **Returns** `model`, as `replace_batch_norm` does; a replaced layer of another class
    gets its class back, and a layer of a class that inherits from jaxbn's keeps it.

    **Raises** `ValueError`, and changes nothing, if a layer was built with
    `momentum=None` or `unbiased=True`: Flax has neither.

    >>> import jaxbn.nnx
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> type(jaxbn.nnx.restore_batch_norm(layer)) is nnx.BatchNorm
    True
    """
    layers = [
        (layer, kind)
        for layer in batch_norms(model).values()
        if (kind := original_class(type(layer))) is not None
    ]
    for layer, _ in layers:
        unbiased = vars(layer).get("unbiased", False)
        check_restorable(layer.momentum, unbiased, hasattr(layer, "count"))
    for layer, kind in layers:
        for name in {"unbiased", "autodiff"} & vars(layer).keys():
            delattr(layer, name)
        replace_class(layer, kind)
    for bridge in bridges(model).values():
        if isinstance(bridge, ReplacedToNNX):
            del bridge.to_nnx__autodiff, bridge.to_nnx__unbiased, bridge.to_nnx__also
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
