"""Calls of layers in models whose code stays as it is."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from inspect import unwrap

from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

NextCall = Callable[..., Array]


def intercept_calls(
    kinds: Iterable[type[nn.Module]], replacement: Callable[..., ArrayLike]
) -> AbstractContextManager[None]:
    """Replace the `__call__` of these classes, also where a subclass calls it.

    `replacement(next_call, module, *args, **kwargs)` is called instead; `next_call`
    takes the arguments without the module.

    Source: `flax.linen.intercept_methods`.
    """
    calls = {unwrap(kind.__call__) for kind in kinds}

    def interceptor(
        next_call: NextCall,
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        context: nn.module.InterceptorContext,
    ) -> PyTree:
        # By function, not by class: a subclass may call it through super.
        if unwrap(context.orig_method.func) in calls:  # pyright: ignore[reportFunctionMemberAccess]
            return replacement(next_call, context.module, *args, **kwargs)
        return next_call(*args, **kwargs)

    return nn.intercept_methods(interceptor)
