"""Fine-tuning a linen model whose batch norms stay as they are."""

from collections.abc import Mapping

import jax
from jax.tree_util import DictKey, KeyPath
from jaxtyping import PyTree

from .._flax.paths import check_has_batch_norm
from ._tree import batch_norm_paths


def batch_norm_mask(variables: Mapping[str, PyTree]) -> PyTree:
    """Mark the batch norms' parameters in a linen model: a mask for optax.

    Three things can be frozen. The statistics: call the layers with
    `use_running_average=True` while training, and no longer pass
    `mutable=["batch_stats"]`. y is then affine in x, and so is the gradient that
    reaches scale, bias and the layers before. Scale and bias: give them no update, by
    this mask. With both frozen the layer is constant. The mask's other use is to keep
    weight decay off scale and bias.

    **Arguments**: `variables` of the model, `params` and `batch_stats`.

    **Returns** a tree like `variables["params"]`: `True` at `scale` and `bias` of each
    module that has a `mean` and a `var` among its statistics, `False` elsewhere.

    **Raises** `ValueError` if there is no batch norm.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen, optax
    >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> mask = jaxbn.linen.batch_norm_mask(variables)
    >>> mask
    {'layers_0': {'bias': False, 'kernel': False},
     'layers_1': {'bias': True, 'scale': True}}
    >>> frozen = optax.chain(optax.adam(1e-3), optax.transforms.freeze(mask))
    >>> others = jax.tree.map(lambda m: not m, mask)
    >>> decay = optax.add_decayed_weights(1e-4, mask=others)
    """
    norms = set(batch_norm_paths(variables.get("batch_stats", {})))
    check_has_batch_norm(norms, "the model must have a batch norm; found")

    def is_of_norm(path: KeyPath, _: object) -> bool:
        # By the keys of dicts alone: a box around an array adds others.
        *module, name = (key.key for key in path if isinstance(key, DictKey))
        return tuple(module) in norms and name in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(is_of_norm, variables["params"])
