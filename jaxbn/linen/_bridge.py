"""The nnx modules inside a linen model, each in a `flax.nnx.bridge.ToLinen`."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from flax import linen as nn
from jaxtyping import PyTree


def intercept_bridges(
    change: Callable[[nn.Module, object], object],
) -> AbstractContextManager[None]:
    """Call `change(bridge, module)` for each nnx module that a `ToLinen` makes.

    A `ToLinen` makes its module anew in each call, and then reads the variables.
    """

    def interceptor(
        next_call: Callable[..., PyTree],
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        context: nn.module.InterceptorContext,
    ) -> PyTree:
        bridge = context.module
        if not _is_bridge(bridge):
            return next_call(*args, **kwargs)
        make = bridge.nnx_class

        def make_changed(*args: PyTree, **kwargs: PyTree) -> object:
            module = make(*args, **kwargs)
            change(bridge, module)
            return module

        # Linen's own `__setattr__` refuses this while the module is bound.
        object.__setattr__(bridge, "nnx_class", make_changed)
        try:
            return next_call(*args, **kwargs)
        finally:
            object.__setattr__(bridge, "nnx_class", make)

    return nn.intercept_methods(interceptor)


def _is_bridge(module: nn.Module) -> bool:
    # No `ToLinen` without flax.nnx, which is slow to import.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(module, nnx.bridge.ToLinen)
