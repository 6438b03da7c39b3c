"""Names of the arrays that the backward pass reads, and a policy that saves these."""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "jaxbn"
_save_named = jax.checkpoint_policies.save_only_these_names(NAME)

Tree = TypeVar("Tree")  # a pytree of arrays


def name_saved(tree: Tree) -> Tree:
    """Mark arrays for `checkpoint_policy`; no operation in the compiled program."""
    return checkpoint_name(tree, NAME)


def checkpoint_policy(primitive: object, *avals: object, **params: object) -> bool:
    """Save batch norm's inputs and statistics, and recompute everything else.

    It is a policy for `jax.checkpoint`, `flax.linen.remat` and `flax.nnx.remat`. A
    network of convolutions, batch norm and activations otherwise keeps two arrays for
    each layer: x, which batch norm reads in the backward pass, and the activation that
    the next convolution reads. With the policy it keeps x, and computes the activation
    again from x by an elementwise pass. No convolution and no statistic that the policy
    sees is computed twice.

    It serves `autodiff="custom_vjp"`; plain JAX (`autodiff="jax"`) names no arrays.
    `jax.checkpoint_policies.save_from_both_policies` joins it with another policy.

    >>> from functools import partial
    >>> import jax, jaxbn
    >>> params, state = jaxbn.init(3)
    >>> @partial(jax.checkpoint, policy=jaxbn.checkpoint_policy)
    ... def block(kernel, x):
    ...     y, _ = jaxbn.batch_norm(params, state, x @ kernel, train=True)
    ...     return jax.nn.relu(y)
    """
    return _save_named(primitive, *avals, **params)
