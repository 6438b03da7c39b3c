"""The linen models inside an nnx model, each in a `flax.nnx.bridge.ToNNX`.

The variables of a linen model are attributes of its `ToNNX`: dicts of nnx Variables.
"""

from flax import nnx
from flax.core.scope import CollectionFilter, union_filters
from jaxtyping import PyTree

from .._core.options import Autodiff
from .._flax.paths import Path
from ..linen._population import accumulating
from ..linen._replace import replace_batch_norm
from ._graph import batch_norms, iterate, statistics


def bridges(model: PyTree) -> dict[Path, nnx.bridge.ToNNX]:
    """Return all `ToNNX` by their paths, subclasses included."""
    nodes = iterate(model)
    return {path: node for path, node in nodes if isinstance(node, nnx.bridge.ToNNX)}


def all_statistics(model: PyTree) -> dict[Path, dict[str, nnx.BatchStat]]:
    """Return the running statistics of all batch norms, linen's included, by path."""
    layers = {path: statistics(layer) for path, layer in batch_norms(model).items()}
    for path, bridge in bridges(model).items():
        layers |= {(*path, *inner): s for inner, s in _linen_statistics(bridge).items()}
    return layers


def _linen_statistics(bridge: nnx.bridge.ToNNX) -> dict[Path, dict[str, nnx.BatchStat]]:
    """Return the variables of each linen module that has a mean and a variance."""
    modules: dict[Path, dict[str, nnx.BatchStat]] = {}
    for path, node in iterate(bridge):
        if isinstance(node, nnx.BatchStat):
            modules.setdefault(path[:-1], {})[str(path[-1])] = node
    return {path: s for path, s in modules.items() if {"mean", "var"} <= s.keys()}


class ReplacedToNNX(nnx.bridge.ToNNX):
    """Compute the linen model's batch norms with jaxbn."""

    # Flax passes attributes with this prefix to no linen model.
    to_nnx__autodiff: Autodiff
    to_nnx__unbiased: bool
    to_nnx__also: tuple[type, ...]

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        with replace_batch_norm(
            autodiff=self.to_nnx__autodiff,
            unbiased=self.to_nnx__unbiased,
            also=self.to_nnx__also,
        ):
            return super().__call__(*args, **kwargs)


class MeasuredToNNX(nnx.bridge.ToNNX):
    """Accumulate the input of the linen model's batch norms."""

    def __call__(
        self, *args: PyTree, mutable: CollectionFilter | None = None, **kwargs: PyTree
    ) -> PyTree:
        mutable = union_filters(mutable or False, "batch_stats")
        with accumulating():
            return super().__call__(*args, mutable=mutable, **kwargs)
