"""Batch normalization for JAX: a pure function with a closed-form backward pass.

`jaxbn.linen` and `jaxbn.nnx` hold the layers for Flax, `jaxbn.convert` converts
variables from and to other libraries.
"""

import importlib
import types
import typing

from ._core.batch_norm import batch_norm as batch_norm
from ._core.checkpoint import checkpoint_policy as checkpoint_policy
from ._core.variables import BatchNormParams as BatchNormParams
from ._core.variables import BatchNormState as BatchNormState
from ._core.variables import init as init
from ._inference.folding import fold as fold
from ._inference.folding import inference_affine as inference_affine
from ._inference.population import population as population

if typing.TYPE_CHECKING:
    from . import convert as convert
    from . import linen as linen
    from . import nnx as nnx

__version__ = "0.1.0"
__all__ = [
    "BatchNormParams",
    "BatchNormState",
    "batch_norm",
    "checkpoint_policy",
    "fold",
    "inference_affine",
    "init",
    "population",
]
_SUBMODULES = ("convert", "linen", "nnx")


def __getattr__(name: str) -> types.ModuleType:
    """Import `convert`, `linen` or `nnx` on first use: the core needs no Flax."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES, "__version__"]
