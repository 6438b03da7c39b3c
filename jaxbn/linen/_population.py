"""Population statistics of every batch norm layer in a linen model, in one pass."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import unwrap
from typing import Any, Literal

import jax
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import ArrayLike

from .._flax.layer import absorb_call, as_inexact, mapped_names, recomputed
from .._inference.population import Tally, no_tally, tallies
from .._inference.population_checks import check_layers, check_variance
from ._batch_norm import BatchNorm, compute


def population(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    variance: Literal["paper", "total"] | Any = "paper",
    max_batches: int | Any | None = None,
    call: Callable[..., Any] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Any:
    """Recompute the statistics of every batch norm layer, with the parameters fixed.

    For inference after training, with averaged weights (EMA, SWA), or on new data. In
    the pass each batch is normalized by its own statistics, in every layer, whatever
    `use_running_average` the model passes; the formulae are at `jaxbn.population`.

    **Arguments**

    - `model`, `variables`: as for `model.apply`. Layers are Flax's, jaxbn's, and those
      that inherit from either.
    - `batches`: an iterable of batches, each an array or a pytree of arrays. Sharded
      ones give the statistics of the whole batch.
    - `variance`, `max_batches`, `progress`: as in `jaxbn.population`.
    - `call`: a function of the bound model and a batch, for models that want more than
      the batch: `lambda model, batch: model(batch["image"], train=False)`. What it
      returns is dropped. Compiled once for each shape of batch, and not again in later
      calls with the same `model` and `call`.

    **Returns** `variables` with new `mean` and `var` (and `count`, where a layer has
    one: the batches absorbed) in `batch_stats`; all else is as it came, containers
    included. A layer called several times takes each call for a batch. Masks of a call
    count as in training. A layer that the pass does not reach keeps its statistics, and
    so does a channel that never had a row. An `axis_name` is honoured where the model
    itself maps it (`nn.vmap`), and ignored where the training step did.

    **Raises** `ValueError` where no batch norm layer is reached, and as
    `jaxbn.population` does; `variables` are never changed.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
    >>> model = nn.BatchNorm(use_running_average=True)
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[6.0], [8.0], [10.0]])]
    >>> variables = model.init(jax.random.key(0), batches[0])
    >>> jaxbn.linen.population(model, variables, batches)["batch_stats"]
    {'mean': Array([5.6], dtype=float32), 'var': Array([3.2], dtype=float32)}
    """
    check_variance(variance)
    stats = variables.get("batch_stats", {})
    flat = flatten_dict(unfreeze(stats), keep_empty_nodes=True)
    layers = _layers(flat)
    check_layers(layers, "variables with batch_stats of a batch norm layer")
    # Bound methods are hashed by the identity of their object: any model will do.
    measure = partial(_measure, model.apply, call, variables)
    totals = tallies(measure, batches, max_batches, progress)
    for name, new in recomputed(totals, layers, variance).items():
        flat |= {(*_path(name), key): value for key, value in new.items()}
    new_stats = unflatten_dict(flat)
    new_stats = freeze(new_stats) if isinstance(stats, FrozenDict) else new_stats
    new_variables = {**variables, "batch_stats": new_stats}
    return freeze(new_variables) if isinstance(variables, FrozenDict) else new_variables


def _layers(flat: Mapping[Any, Any]) -> dict[str, dict[str, Array]]:
    """By name, what `batch_stats` holds of whatever has a mean and a variance."""
    paths = [path[:-1] for path in flat if path[-1] == "mean"]
    return {
        "/".join(path): {
            key: flat[*path, key]
            for key in ("mean", "var", "count")
            if (*path, key) in flat
        }
        for path in paths
        if (*path, "var") in flat
    }


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("/")) if name else ()


@partial(jax.jit, static_argnums=(0, 1))
def _measure(
    apply: Callable[..., Any], call: Any, variables: Any, batch: Any
) -> dict[str, Tally]:
    """One batch's tally of every layer.

    The layers keep it in `batch_stats`, beside mean and var and in their shape, since a
    lifted transformation (scan, vmap, remat) carries, splits and stacks it with them.
    """
    flat: dict[Any, Any] = flatten_dict(unfreeze(variables["batch_stats"]))
    for name, stats in _layers(flat).items():
        flat[*_path(name), _TALLY] = no_tally(stats["mean"])
    start = {**variables, "batch_stats": unflatten_dict(flat)}
    with measuring(True), nn.intercept_methods(_interceptor):
        _, updates = apply(start, batch, method=call, mutable=["batch_stats"])
    flat = flatten_dict(unfreeze(updates["batch_stats"]))
    return {"/".join(p[:-1]): value for p, value in flat.items() if p[-1] == _TALLY}


_TALLY = "tally"
_CALLS = {unwrap(nn.BatchNorm.__call__), unwrap(BatchNorm.__call__)}
# A part of the key of every jit cache: what was compiled without is not taken within.
measuring = jax.make_user_context(False)


def _interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    # By function, not by class: so also where a subclass calls it through super.
    if unwrap(context.orig_method.func) in _CALLS:
        return _measured(context.module, *args, **kwargs)
    return next_fun(*args, **kwargs)


def _measured(
    layer: nn.BatchNorm,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
) -> Array:
    """A call by the batch's own statistics, which the layer's tally takes in."""
    del use_running_average
    axis_name = mapped_names(layer.axis_name)
    old = layer.get_variable("batch_stats", _TALLY)
    new = absorb_call(old, layer, as_inexact(x), mask, axis_name)
    layer.put_variable("batch_stats", _TALLY, new)
    return compute(layer, x, train=True, mask=mask, axis_name=axis_name)
