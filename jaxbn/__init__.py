"""Batch normalization for JAX: a pure function with a closed-form backward.

`jaxbn.linen` and `jaxbn.nnx` hold the layers for Flax, `jaxbn.convert` takes variables
from and to other libraries.
"""

import importlib
import types
import typing

from ._core.batch_norm import batch_norm as batch_norm
from ._core.init import init as init
from ._core.variables import BatchNormParams as BatchNormParams
from ._core.variables import BatchNormState as BatchNormState
from ._inference.folding import fold as fold
from ._inference.folding import inference_affine as inference_affine
from ._inference.population import population as population

if typing.TYPE_CHECKING:
    from . import convert as convert
    from . import linen as linen
    from . import nnx as nnx

__version__ = "0.1.0"


def __getattr__(name: str) -> types.ModuleType:
    """Import `jaxbn.linen`, `.nnx`, `.convert` on first use: the core needs no Flax."""
    if name in ("linen", "nnx", "convert"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
