"""Fine-tuning a linen model whose batch norms stay as they are."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.tree_util import DictKey

from .._inference.folding_checks import check_has_batch_norm


def batch_norm_mask(variables: Mapping[str, Any]) -> Any:
    """Which of a linen model's parameters belong to batch norms: a mask for optax.

    Three things can be frozen. The statistics: call the layers with
    `use_running_average=True` while training, and pass `mutable=["batch_stats"]` no
    longer. y is then affine in x, and so is the gradient that reaches scale, bias and
    what is before. Scale and bias: give them no update, by this mask. With both frozen
    nothing of the layer moves. To keep weight decay off them is the mask's other use.

    **Arguments**: `variables` of the model, `params` and `batch_stats`.

    **Returns** a tree like `variables["params"]`: `True` at `scale` and `bias` of each
    module that has a `mean` and a `var` among its statistics, `False` elsewhere.

    **Raises** `ValueError` where there is no batch norm.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen, optax
    >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(True)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> mask = jaxbn.linen.batch_norm_mask(variables)
    >>> mask
    {'layers_0': {'bias': False, 'kernel': False},
     'layers_1': {'bias': True, 'scale': True}}
    >>> frozen = optax.chain(optax.adam(1e-3), optax.masked(optax.set_to_zero(), mask))
    >>> others = jax.tree.map(lambda m: not m, mask)
    >>> decay = optax.masked(optax.add_decayed_weights(1e-4), others)
    """
    stats = set(flatten_dict(dict(variables.get("batch_stats", {}))))
    norms = {p[:-1] for p in stats if {(*p[:-1], "mean"), (*p[:-1], "var")} <= stats}
    check_has_batch_norm(norms)

    def is_of_norm(path: Any, _: Any) -> bool:
        # By the keys of dicts alone: a box around an array adds others.
        *module, name = (key.key for key in path if isinstance(key, DictKey))
        return tuple(module) in norms and name in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(is_of_norm, variables["params"])
