"""Population statistics of every batch norm layer in a linen model, in one pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import jax
from flax import linen as nn
from flax.core import unfreeze
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._core.variables import BatchNormState
from .._flax.layer import as_inexact, mapped_names
from .._flax.paths import Path, check_has_batch_norm, join
from .._flax.population import (
    ACCUMULATOR,
    accumulate_call,
    add_call_note,
    add_note,
    measure_stacks,
    new_statistics,
    only_mapped_axes,
    select_layers,
)
from .._inference.accumulator import Accumulator
from .._inference.batches import accumulate
from .._inference.population import Variance, check_variance
from ._batch_norm import BatchNorm, _apply_layer
from ._bridge import intercept_bridges
from ._intercept import NextCall, intercept_calls
from ._tree import Variables, batch_norm_paths, paths_with, rebuild_like


def population(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    batches: Iterable[PyTree],
    *,
    variance: Variance = "paper",
    max_batches: int | None = None,
    call: Callable[..., object] | None = None,
    progress: Callable[[Iterable[PyTree]], Iterable[PyTree]] | None = None,
    layers: Callable[[str], object] | None = None,
    rngs: ArrayLike | Mapping[str, ArrayLike] | None = None,
    skip_nonfinite: bool = False,
) -> Mapping[str, PyTree]:
    """Recompute the statistics of every batch norm layer, with the parameters fixed.

    For inference after training, with averaged weights (EMA, SWA), or on new data. In
    the pass each batch is normalized by its own statistics, in every layer, whatever
    `use_running_average` the model passes, unless `layers` leaves the layer out; the
    formulas are at `jaxbn.population`.

    **Arguments**

    - `model`, `variables`: as for `model.apply`. Layers are Flax's, jaxbn's, and
      layers of classes that inherit from either, nnx's in a `flax.nnx.bridge.ToLinen`
      included. Variables stacked over seeds by `jax.vmap(model.init)` give the
      statistics of each seed.
    - `batches`: an iterable of batches, each an array or a pytree of arrays; `[images]`
      for one batch. Sharded batches give the statistics of the whole batch.
    - `variance`, `max_batches`, `progress`, `skip_nonfinite`: as in
      `jaxbn.population`. A batch that is not finite in one layer is left out in all.
    - `call`: a function of the bound model and a batch, for models with more arguments
      than the batch: `lambda model, batch: model(batch["image"], train=False)`. Its
      return value is dropped. Compiled once for each shape of batch, and not again in
      later calls with the same `model` and `call`.
    - `layers`: a function of a layer's path, such as `"Block_0/BatchNorm_1"`: whether
      to recompute the layer. The others keep their statistics and are called as the
      model calls them; a frozen layer still normalizes by its running statistics.
    - `rngs`: streams for a model that samples, as for `model.apply`: a key, or a dict
      of keys. In batch i, counted from 0, each key is `jax.random.fold_in(key, i)`. All
      seeds of a stack of models have the same.

    **Returns** `variables` with new `mean` and `var` (and `count`, the number of
    batches, where a layer has one) in `batch_stats`; all else is unchanged, containers
    included. If a layer is called several times, each call counts as a batch. Masks of
    a call have the same effect as in training. A layer that the pass does not reach
    keeps its statistics, and so does a feature without an element in any batch. An
    `axis_name` is used if the model itself maps it (`nn.vmap`), and ignored if the
    training step did.

    **Raises** `ValueError` if no batch norm layer is reached or selected, and as
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
    paths = {join(path): path for path in batch_norm_paths(stats)}
    check_has_batch_norm(
        paths, "population needs variables with batch_stats of a batch norm layer; got"
    )
    flat: dict[Path, PyTree] = flatten_dict(unfreeze(stats), keep_empty_nodes=True)
    old = {name: _statistics(flat, path) for name, path in paths.items()}
    selected = tuple(paths[name] for name in select_layers(paths, layers))
    # Bound methods are hashed by the identity of their object: any model will do.
    streams = _make_streams(rngs)
    measure = partial(_measure, model.apply, call, selected, variables, streams)
    totals = accumulate(measure, batches, max_batches, progress, skip_nonfinite)
    for name, new in new_statistics(totals, old, variance).items():
        flat |= {(*paths[name], key): value for key, value in new.items()}
    return rebuild_like({**variables, "batch_stats": unflatten_dict(flat)}, variables)


def _statistics(flat: Mapping[Path, Array], path: Path) -> dict[str, Array]:
    """Return the statistics of the layer at `path`, by name."""
    return {
        name: flat[*path, name]
        for name in BatchNormState._fields
        if (*path, name) in flat
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
    apply: Callable[..., PyTree],
    call: Callable[..., object] | None,
    selected: tuple[Path, ...],
    variables: Variables,
    streams: Mapping[str, ArrayLike],
    number: int | Array,
    batch: PyTree,
) -> dict[str, Accumulator]:
    """Accumulate one batch in every selected layer."""
    rngs = _fold_in(streams, number)

    def measure(variables: Variables) -> dict[str, Accumulator]:
        start = _add_accumulators(variables, selected)
        with accumulating(), add_call_note(call is None), _add_rngs_note():
            _, updates = apply(
                start, batch, rngs=rngs, method=call, mutable=["batch_stats"]
            )
        flat: dict[Path, PyTree] = flatten_dict(unfreeze(updates["batch_stats"]))
        return {join(path): flat[*path, ACCUMULATOR] for path in selected}

    return measure_stacks(measure, variables)


def _make_streams(
    rngs: ArrayLike | Mapping[str, ArrayLike] | None,
) -> dict[str, ArrayLike]:
    """Return a key for each stream; Flax calls the stream of a single key "params"."""
    if rngs is None:
        given = {}
    elif isinstance(rngs, Mapping):
        given = rngs
    else:
        given = {"params": rngs, "default": rngs}
    # Without a stream of this name, `ToLinen` draws from seed 0 in each batch.
    streams = {"default": jax.random.key(0), **given}
    try:
        jax.eval_shape(_fold_in, streams, 0)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "rngs must be a key, or a dict of keys by the names of streams, as for "
            f"model.apply; got {rngs!r}. Write rngs={{'dropout': jax.random.key(0)}}."
        ) from error
    return streams


def _fold_in(streams: Mapping[str, ArrayLike], number: int | Array) -> dict[str, Array]:
    """Return the keys of the batch of this number."""
    return {name: jax.random.fold_in(key, number) for name, key in streams.items()}


def _add_rngs_note() -> AbstractContextManager[None]:
    return add_note(
        InvalidRngError,
        "The model draws random numbers: pass population a key for each of its "
        "streams, rngs={'dropout': key}, or call the model as at evaluation.",
    )


def _add_accumulators(variables: Variables, paths: Iterable[Path]) -> Variables:
    """Add an empty accumulator to each of these layers.

    The accumulators are in `batch_stats`, beside mean and var and in the same shape,
    since lifted transformations (scan, vmap, remat) carry, split and stack the three.
    """
    flat: dict[Path, PyTree] = flatten_dict(unfreeze(variables["batch_stats"]))
    for path in paths:
        flat[*path, ACCUMULATOR] = Accumulator.empty(flat[*path, "mean"])
    return {**variables, "batch_stats": unflatten_dict(flat)}


# Part of the key of every jit cache: functions compiled outside are not reused inside.
measuring = jax.make_user_context(False)


@contextmanager
def accumulating() -> Iterator[None]:
    """Accumulate the input of all layers whose variables hold an accumulator."""
    calls = intercept_calls((nn.BatchNorm, BatchNorm), _accumulate_and_apply)
    with measuring(True), calls, intercept_bridges(_measure_module):
        yield


def _measure_module(bridge: nn.Module, module: object) -> None:
    from ..nnx._population import make_measured  # a circular import

    paths = paths_with(bridge.variables["batch_stats"], ACCUMULATOR)
    make_measured(module, [join(path) for path in paths])


def _accumulate_and_apply(
    next_call: NextCall,
    layer: nn.BatchNorm,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
    update_statistics: bool = True,
) -> Array:
    """Accumulate the input of a selected layer, and normalize it by its statistics."""
    del update_statistics  # no statistics of this pass are kept
    if not layer.has_variable("batch_stats", ACCUMULATOR):
        with only_mapped_axes(layer, layer.axis_name):
            return next_call(x, use_running_average, mask=mask)
    axis_name = mapped_names(layer.axis_name)
    old = layer.get_variable("batch_stats", ACCUMULATOR)
    new = accumulate_call(old, layer, as_inexact(x), mask, axis_name)
    layer.put_variable("batch_stats", ACCUMULATOR, new)
    return _apply_layer(layer, x, train=True, mask=mask, axis_name=axis_name)
