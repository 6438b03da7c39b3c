"""Names of the arrays that the backward pass reads, and a policy that saves these."""

from collections.abc import Callable
from inspect import isfunction
from typing import TypeVar, cast

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "jaxbn"
_save_named = jax.checkpoint_policies.save_only_these_names(NAME)

Tree = TypeVar("Tree")  # a pytree of arrays
Policy = TypeVar("Policy", bound=Callable[..., bool])


def name_saved(tree: Tree) -> Tree:
    """Mark arrays for `checkpoint_policy`; no operation in the compiled program."""
    return checkpoint_name(tree, NAME)


def _as_class_of_jax(function: Policy) -> Policy:
    """Return JAX's own policy, if it is an object, with the function's docstring.

    With `jax_remat3`, JAX 0.10.2 reads the names in such an object, and calls nothing.
    """
    if isfunction(_save_named):
        return function
    object.__setattr__(_save_named, "__doc__", function.__doc__)
    return cast(Policy, _save_named)


@_as_class_of_jax
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
