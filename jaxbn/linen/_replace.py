"""Flax's layers, computed by jaxbn, in models whose code stays as it is."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ContextDecorator,
    ExitStack,
    contextmanager,
)
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Literal

import jax
from flax import linen as nn
from jax import Array
from jaxtyping import PyTree

from .._core.options import Autodiff, check_autodiff
from .._flax.layer import check_flag
from .._flax.lookalikes import check_also, warn_not_replaced
from .._flax.paths import Path, join
from ._batch_norm import BatchNorm, apply_layer
from ._bridge import intercept_bridges
from ._intercept import NextCall, intercept_calls
from ._lookalikes import apply_lookalike
from ._population import measuring


def replace_batch_norm(
    *,
    autodiff: Literal["custom_vjp", "jax"] = "custom_vjp",
    unbiased: bool = False,
    also: Iterable[type] = (),
) -> "Replaced":
    """Compute every `flax.linen.BatchNorm` with jaxbn, in unchanged models.

    A context manager, which may be entered again, and a decorator. It acts on all code
    that is traced in this thread while it is entered; compiled functions are traced
    anew inside it, and again outside. Of nested contexts the innermost one decides.
    Layers that inherit `__call__` from Flax's, or call it, are included, and so are
    layers of `flax.nnx.BatchNorm` in a `flax.nnx.bridge.ToLinen`.
    Parameters, statistics and gradients keep their places; the other differences are
    listed at `BatchNorm`.

    **Arguments**

    - `autodiff`, `unbiased`: as in `BatchNorm`; `unbiased=True` is PyTorch's running
      variance. Layers of jaxbn in the model keep their own.
    - `also`: other classes to replace, which have Flax's fields and variables, and are
      called with `x`, with `use_running_average` or `train` (`training`,
      `is_training`), and with `mask`. Fields that they lack have Flax's defaults.

    **Returns** a context manager whose value is a list of the paths of the layers that
    were replaced so far, such as `"Block_0/BatchNorm_1"`; a function that was compiled
    before adds none.

    It replaces the call itself, so that interceptors entered inside it do not see the
    calls of `BatchNorm`: enter it last.

    **Warns** at exit if layers with running statistics were called, and none replaced.

    **Raises** `ValueError` if `autodiff` is neither of the two; `TypeError` for classes
    in `also` with other arguments or variables.

    Source: `flax.linen.intercept_methods`, Flax's own mechanism for this purpose.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
    >>> x = 1e4 + jax.random.normal(jax.random.key(0), (256, 1))
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> variables = model.init(jax.random.key(1), x)
    >>> @jax.jit
    ... def std(variables, x):
    ...     y, _ = model.apply(variables, x, mutable=["batch_stats"])
    ...     return y.std().round(2)
    >>> with jaxbn.linen.replace_batch_norm() as paths:
    ...     print(std(variables, x), paths)
    1.0 ['']
    """
    unbiased = check_flag("unbiased", unbiased)
    return Replaced(Replacement(check_autodiff(autodiff), unbiased, check_also(also)))


@dataclass(frozen=True)
class Replacement:
    """The options of a replacement."""

    autodiff: Autodiff
    unbiased: bool
    also: tuple[type, ...]


class Replaced(ContextDecorator, AbstractContextManager[list[str]]):
    """Replace the layers while it is entered: again, within itself, in any thread."""

    def __init__(self, options: Replacement):
        self._options, self._entered = options, _Entered()

    def __enter__(self) -> list[str]:
        context = _replace(self._options)
        paths = context.__enter__()
        self._entered.contexts.append(context)
        return paths

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._entered.contexts.pop().__exit__(kind, error, traceback)


class _Entered(threading.local):
    """The contexts that this thread has entered and not left."""

    def __init__(self) -> None:
        self.contexts: list[AbstractContextManager[list[str]]] = []


@contextmanager
def _replace(options: Replacement) -> Iterator[list[str]]:
    with ExitStack() as stack:
        record = _Record(_innermost.get())
        stack.callback(_innermost.reset, _innermost.set(record))
        stack.enter_context(_replaced(options))
        calls = partial(_apply_layer, options, record)
        stack.enter_context(intercept_calls([nn.BatchNorm], calls))
        for kind in options.also:
            if issubclass(kind, nn.Module):
                calls = partial(_apply_lookalike, options, record, kind)
                stack.enter_context(intercept_calls([kind], calls))
        change = partial(_replace_in_module, options, record)
        stack.enter_context(intercept_bridges(change))
        stack.enter_context(nn.intercept_methods(record.watch))
        yield record.served
    if record.others and not record.served:
        warn_not_replaced("this context", record.others, stacklevel=4)


@dataclass
class _Record:
    """The layers that were called: the paths of the replaced, the kinds of others."""

    outer: "_Record | None"  # of the context around this one
    served: list[str] = field(default_factory=list)
    others: dict[str, type] = field(default_factory=dict)

    def serve(self, path: Path) -> None:
        """Record the path of a replaced layer."""
        if join(path) not in self.served:
            self.served.append(join(path))
        if self.outer is not None:
            self.outer.serve(path)

    def watch(
        self,
        next_call: NextCall,
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        context: nn.module.InterceptorContext,
    ) -> PyTree:
        """Call a module, and record it if it has running statistics of its own."""
        result = next_call(*args, **kwargs)
        module = context.module
        if module.scope is not None and not isinstance(module, BatchNorm):
            # Afterwards, since `init` makes the variables in the call.
            stats = module.variables.get("batch_stats", {})
            if not all(isinstance(value, Mapping) for value in stats.values()):
                self.others[join(module.path)] = type(module)
        return result


# The contexts outside of this one hand the calls on: Flax calls them first.
_innermost: ContextVar[_Record | None] = ContextVar("innermost", default=None)


def _replace_in_module(
    options: Replacement, record: _Record, bridge: nn.Module, module: object
) -> None:
    from ..nnx import _replace as nnx_replace  # a circular import

    if record is not _innermost.get():
        return
    given = options.autodiff, options.unbiased, options.also
    paths = nnx_replace.replace_layers(module, *given)
    nnx_replace.replace_bridges(module, *given)
    for path in paths:
        record.serve((*bridge.path, *path))
    for path, kind in nnx_replace.other_kinds(module).items():
        record.others[join((*bridge.path, *path))] = kind


def _apply_layer(
    options: Replacement,
    record: _Record,
    next_call: NextCall,
    layer: nn.BatchNorm,
    *args: PyTree,
    **kwargs: PyTree,
) -> Array:
    """Apply a layer by jaxbn, except in a pass of `population`, which does so."""
    if record is not _innermost.get():
        return next_call(*args, **kwargs)
    record.serve(layer.path)
    if measuring.value:
        return next_call(*args, **kwargs)
    unbiased, autodiff = options.unbiased, options.autodiff
    return apply_layer(layer, *args, **kwargs, unbiased=unbiased, autodiff=autodiff)


def _apply_lookalike(
    options: Replacement,
    record: _Record,
    kind: type[nn.Module],
    next_call: NextCall,
    layer: nn.Module,
    *args: PyTree,
    **kwargs: PyTree,
) -> Array:
    """Apply a layer of another class, which makes its variables itself."""
    if record is not _innermost.get():
        return next_call(*args, **kwargs)
    record.serve(layer.path)
    if layer.is_initializing():
        return next_call(*args, **kwargs)
    unbiased, autodiff = options.unbiased, options.autodiff
    return apply_lookalike(
        kind.__call__, layer, args, kwargs, unbiased=unbiased, autodiff=autodiff
    )


# Part of the key of every jit cache: functions compiled outside are not reused inside.
_replaced = jax.make_user_context(None)
