"""Calls of layers in models whose code stays as it is."""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import fields
from inspect import unwrap
from typing import TypeVar

import jax
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PyTree

NextCall = Callable[..., Array]
Kind = TypeVar("Kind", bound=nn.Module)


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
        if _calling_plain.value:
            return context.orig_method(*args, **kwargs)
        # By function, not by class: a subclass may call it through super.
        if unwrap(context.orig_method.func) in calls:  # pyright: ignore[reportFunctionMemberAccess]
            return replacement(next_call, context.module, *args, **kwargs)
        return next_call(*args, **kwargs)

    return nn.intercept_methods(interceptor)


# Whether a plain layer is called.
_calling_plain = jax.make_user_context(False)


def calling_plain() -> AbstractContextManager[None]:
    """Call layers themselves, past this module's replacements and those inside."""
    return _calling_plain(True)


def plain_copy(layer: nn.Module, kinds: Collection[type[Kind]]) -> Kind:
    """Return a layer with the same options of the first of `kinds` that it is."""
    kind = next(kind for kind in type(layer).__mro__ if kind in kinds)
    names = {field.name for field in fields(kind)} - {"parent", "name"}
    return kind(**{name: getattr(layer, name) for name in names}, parent=None)
