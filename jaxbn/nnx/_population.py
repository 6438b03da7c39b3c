"""Population statistics of every batch norm layer in an nnx model, in one pass."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal

import jax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from .._flax.layer import absorb_call, as_inexact, mapped_names, recomputed
from .._inference.population import Tally, no_tally, tallies
from .._inference.population_checks import check_layers, check_variance
from ._batch_norm import BatchNorm, batch_norms, set_class


def _call_model(model: Any, batch: Any) -> Any:
    return model(batch)


def population(
    model: Any,
    batches: Iterable[Any],
    *,
    variance: Literal["paper", "total"] | Any = "paper",
    max_batches: int | Any | None = None,
    call: Callable[[Any, Any], Any] = _call_model,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> None:
    """Recompute the statistics of every batch norm layer, with the parameters fixed.

    For inference after training, with averaged weights (EMA, SWA), or on new data. In
    the pass each batch is normalized by its own statistics, in every layer, whatever
    `use_running_average` says; the formulae are at `jaxbn.population`. Otherwise the
    model runs as it is: after `model.eval()`, without dropout.

    **Arguments**

    - `model`: a module, or lists, dicts and other pytrees of modules. Layers are
      Flax's, jaxbn's, and those that inherit from either.
    - `batches`: an iterable of batches, each an array or a pytree of arrays. Sharded
      ones give the statistics of the whole batch.
    - `variance`, `max_batches`, `progress`: as in `jaxbn.population`.
    - `call`: a function of model and batch, `model(batch)` unless given: `lambda model,
      batch: model(batch["image"])`. What it returns is dropped, and so is what it
      changes in the model. Compiled once for each shape of batch, and not again in
      later calls with the same `call` and a model of the same structure.

    **Returns** nothing: `mean` and `var` of the layers in `model` (and `count`, where a
    layer has one: the batches absorbed) have new values; nothing else changes, and
    nothing at all where an error is raised. A layer called several times takes each
    call for a batch. Masks of a call count as in training. A layer that the pass does
    not reach keeps its statistics, and so does a channel that never had a row. An
    `axis_name` is honoured where the model itself maps it (`nnx.vmap`), and ignored
    where the training step did.

    **Raises** `ValueError` where no batch norm layer is reached, and as
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
    layers = {name: _stats(layer) for name, layer in batch_norms(model).items()}
    check_layers(layers, "a model with a batch norm layer")
    graphdef, state = nnx.split(model, graph=True)
    measure = partial(_measure, graphdef, call, state)
    totals = tallies(measure, batches, max_batches, progress)
    arrays = {
        name: {key: variable.get_value() for key, variable in stats.items()}
        for name, stats in layers.items()
    }
    for name, new in recomputed(totals, arrays, variance).items():
        for key, value in new.items():
            layers[name][key].set_value(value)


def _stats(layer: nnx.BatchNorm) -> dict[str, Any]:
    names = ("mean", "var", "count")
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


@partial(jax.jit, static_argnums=(0, 1))
def _measure(
    graphdef: Any, call: Callable[..., Any], state: Any, batch: Any
) -> dict[str, Tally]:
    """One batch's tally of every layer of a copy of the model."""
    model = nnx.merge(graphdef, state)
    layers = batch_norms(model)
    for layer in layers.values():
        layer.tally = _TallyStat(no_tally(layer.mean.get_value()))
        set_class(layer, _measured(type(layer)))
    call(model, batch)
    return {name: layer.tally.get_value() for name, layer in layers.items()}


class _TallyStat(nnx.BatchStat):
    """Goes where nnx's transformations send the statistics, in their shape."""


class _Measured(BatchNorm):
    """Normalizes by the batch's own statistics, which the layer's tally takes in."""

    tally: _TallyStat

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> Array:
        del use_running_average
        axis_name = mapped_names(self.axis_name)
        (rounded,) = self.promote_dtype((x,), dtype=self.dtype)
        old = self.tally.get_value()
        self.tally.set_value(
            absorb_call(old, self, as_inexact(rounded), mask, axis_name)
        )
        return self._compute(x, train=True, mask=mask, axis_name=axis_name)


@cache
def _measured(kind: type) -> type:
    """`kind` with `_Measured` behind it, where it calls its parent's `__call__`.

    Such is Python's order of inheritance: `kind`, `_Measured`, our layer, Flax's.
    """
    if issubclass(_Measured, kind):
        return _Measured
    return type(kind.__name__, (kind, _Measured), {})
