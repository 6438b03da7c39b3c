"""Linen batch norms of other classes, computed by jaxbn."""

from collections.abc import Callable, Mapping
from dataclasses import fields

from flax import linen as nn
from jax import Array
from jaxtyping import PyTree

from .._core.options import Autodiff
from .._flax.lookalikes import check_variables, read_call
from .._flax.population import ACCUMULATOR
from ._batch_norm import BatchNorm, explain_immutable

_FIELDS = {field.name for field in fields(nn.BatchNorm)} - {"parent", "name"}


def apply_lookalike(
    call: Callable[..., object],
    layer: nn.Module,
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, PyTree],
    *,
    unbiased: bool,
    autodiff: Autodiff,
) -> Array:
    """Apply a layer with Flax's fields and variables, whose `__call__` is `call`."""
    x, use_running_average, mask = read_call(call, layer, args, kwargs)
    params = layer.variables.get("params", {})
    stats = layer.variables.get("batch_stats", {})
    check_variables(type(layer), {*params, *stats} - {ACCUMULATOR})
    options = {name: getattr(layer, name) for name in _FIELDS if hasattr(layer, name)}
    options |= {"use_scale": "scale" in params, "use_bias": "bias" in params}
    norm = BatchNorm(**options, unbiased=unbiased, autodiff=autodiff, parent=None)
    y, updates = norm.apply(
        {"params": params, "batch_stats": stats},
        x,
        use_running_average,
        mask=mask,
        mutable=["batch_stats"],
    )
    with explain_immutable():
        for name, value in updates["batch_stats"].items():
            if value is not stats.get(name):
                layer.put_variable("batch_stats", name, value)
    return y
