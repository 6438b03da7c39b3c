"""Population statistics of every batch norm layer in an nnx model, in one pass."""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar, cast

import jax
from flax import nnx
from flax.errors import TraceContextError
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

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
from ._batch_norm import BatchNorm
from ._bridge import MeasuredToNNX, all_statistics, bridges
from ._graph import batch_norms, get, iterate, put, replace_class, subclass

Model = TypeVar("Model")


def _call_model(model: PyTree, batch: PyTree) -> object:
    return model(batch)


def population(
    model: Model,
    batches: Iterable[PyTree],
    *,
    variance: Variance = "paper",
    max_batches: int | None = None,
    call: Callable[[Model, PyTree], object] = _call_model,
    progress: Callable[[Iterable[PyTree]], Iterable[PyTree]] | None = None,
    layers: Callable[[str], object] | None = None,
    skip_nonfinite: bool = False,
) -> None:
    """Recompute the statistics of every batch norm layer, with the parameters fixed.

    For inference after training, with averaged weights (EMA, SWA), or on new data. In
    the pass each batch is normalized by its own statistics, in every layer, whatever
    `use_running_average` says, unless `layers` leaves the layer out; the formulas are
    at `jaxbn.population`. Otherwise the model runs as it is: after `model.eval()`,
    without dropout. A model that samples draws new numbers in each batch, from its own
    `nnx.Rngs`, which are afterwards as they were.

    **Arguments**

    - `model`: a module, or lists, dicts and other pytrees of modules. Layers are
      Flax's, jaxbn's, and layers of classes that inherit from either, linen's in a
      `flax.nnx.bridge.ToNNX` included. A model stacked over seeds by `nnx.vmap` gets
      the statistics of each seed.
    - `batches`: an iterable of batches, each an array or a pytree of arrays; `[images]`
      for one batch. Sharded batches give the statistics of the whole batch.
    - `variance`, `max_batches`, `progress`, `skip_nonfinite`: as in
      `jaxbn.population`. A batch that is not finite in one layer is left out in all.
    - `call`: a function of model and batch, `model(batch)` unless given: `lambda model,
      batch: model(batch["image"])`. Its return value is dropped, and so are its changes
      to the model: each batch starts with the same Variables, but for the counts of
      `nnx.Rngs`. Streams that the model does not hold go with it: `[net, rngs]` for
      `model`, and `call=lambda model, batch: model[0](batch, rngs=model[1])`. Compiled
      once for each shape of batch, and not again in later calls with the same `call`
      and a model of the same structure.
    - `layers`: a function of a layer's path, such as `"blocks/0/bn"`: whether to
      recompute the layer. The others keep their statistics and are called as the
      model calls them; a frozen layer still normalizes by its running statistics.

    **Returns** nothing: `mean` and `var` of the layers in `model` (and `count`, the
    number of batches, where a layer has one) have new values; nothing else changes, and
    nothing at all if an error is raised. If a layer is called several times, each call
    counts as a batch. Masks of a call have the same effect as in training. A layer that
    the pass does not reach keeps its statistics, and so does a feature without an
    element in any batch. An `axis_name` is used if the model itself maps it
    (`nnx.vmap`), and ignored if the training step did.

    **Raises** `ValueError` if no batch norm layer is reached or selected, and as
    `jaxbn.population` does.

    >>> import jax.numpy as jnp, jaxbn.nnx
    >>> from flax import nnx
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[6.0], [8.0], [10.0]])]
    >>> jaxbn.nnx.population(model, batches)
    >>> model.mean[...], model.var[...]
    (Array([5.6], dtype=float32), Array([3.2], dtype=float32))
    """
    check_variance(variance)
    stats = {join(path): layer for path, layer in all_statistics(model).items()}
    check_has_batch_norm(stats, "population needs a model with a batch norm layer; got")
    measure = _make_measure(model, call, select_layers(stats, layers))
    totals = accumulate(measure, batches, max_batches, progress, skip_nonfinite)
    old = {
        name: {key: variable.get_value() for key, variable in variables.items()}
        for name, variables in stats.items()
    }
    for name, new in new_statistics(totals, old, variance).items():
        for key, value in new.items():
            stats[name][key].set_value(value)


def _make_measure(
    model: Model, call: Callable[[Model, PyTree], object], selected: tuple[str, ...]
) -> Callable[[int, PyTree], dict[str, Accumulator]]:
    """Return a function of the batch whose model draws new numbers in each call."""
    graphdef, state = nnx.split(model, graph=True)
    counts = [count.get_value() for count in _draw_counts(model)]

    def measure(_: int, batch: PyTree) -> dict[str, Accumulator]:
        nonlocal counts
        # From the host, as in the first batch: a sharded batch would commit them to
        # its devices, and the second batch would be compiled anew.
        start = jax.device_get(counts)
        accumulators, counts = _measure(call, selected, graphdef, state, start, batch)
        return accumulators

    return measure


def _draw_counts(model: PyTree) -> list[nnx.RngCount]:
    """Return the numbers of draws from each random stream."""
    return [node for _, node in iterate(model) if isinstance(node, nnx.RngCount)]


# The graph is an argument, and not a static one, which would have to be hashable: a
# model may hold lists and dicts. It is a pytree without arrays, and compared by value.
@partial(jax.jit, static_argnums=(0, 1))
def _measure(
    call: Callable[[Model, PyTree], object],
    selected: tuple[str, ...],
    graphdef: nnx.GraphDef[Model],
    state: PyTree,
    counts: list[Array],
    batch: PyTree,
) -> tuple[dict[str, Accumulator], list[Array]]:
    """Accumulate one batch in every selected layer of a copy of the model.

    `counts` are the draws from each stream before the batch, and after it.
    """

    def measure(
        variables: tuple[PyTree, list[Array]],
    ) -> tuple[dict[str, Accumulator], list[Array]]:
        state, counts = variables
        model = nnx.merge(graphdef, state)
        draws = _draw_counts(model)
        for count, value in zip(draws, counts, strict=True):
            count.set_value(value)
        paths = make_measured(model, selected)
        as_it_is = call is _call_model
        with add_call_note(as_it_is), _add_rngs_note(as_it_is):
            call(model, batch)
        accumulators = {path: cast(nnx.BatchStat, get(model, path)) for path in paths}
        return (
            {join(path[:-1]): a.get_value() for path, a in accumulators.items()},
            [count.get_value() for count in draws],
        )

    return measure_stacks(measure, (state, counts))


def _add_rngs_note(as_it_is: bool) -> AbstractContextManager[None]:
    return add_note(
        Exception if as_it_is else TraceContextError,
        "Random streams must be part of the model, also if it takes them as an "
        "argument: population([model, rngs], batches, "
        "call=lambda model, batch: model[0](batch, rngs=model[1])).",
    )


def make_measured(model: PyTree, selected: Collection[str]) -> list[Path]:
    """Make the selected layers accumulate their input; return the accumulators' paths.

    The other layers ignore axis names of the training step as well.
    """
    for layer in batch_norms(model).values():
        replace_class(layer, subclass(type(layer), _MeasuredBatchNorm))
    for bridge in bridges(model).values():
        replace_class(bridge, subclass(type(bridge), MeasuredToNNX))
    layers = {p: s for p, s in all_statistics(model).items() if join(p) in selected}
    for path, stats in layers.items():
        empty = Accumulator.empty(stats["mean"].get_value())
        put(model, (*path, ACCUMULATOR), nnx.BatchStat(empty))
    return [(*path, ACCUMULATOR) for path in layers]


class _MeasuredBatchNorm(BatchNorm):
    """Accumulate the input of a selected layer, and normalize it by its statistics."""

    accumulator: nnx.BatchStat  # of a selected layer

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_statistics: bool = True,
    ) -> Array:
        del update_statistics  # no statistics of this pass are kept
        if not hasattr(self, ACCUMULATOR):
            with only_mapped_axes(self, self.axis_name):
                return super().__call__(x, use_running_average, mask=mask)
        axis_name = mapped_names(self.axis_name)
        (promoted,) = self.promote_dtype((x,), dtype=self.dtype)
        old = self.accumulator.get_value()
        new = accumulate_call(old, self, as_inexact(promoted), mask, axis_name)
        self.accumulator.set_value(new)
        return self._apply_layer(x, train=True, mask=mask, axis_name=axis_name)
