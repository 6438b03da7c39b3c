"""Batch normalization for JAX: a pure function with a closed-form backward.

`jaxbn.linen` and `jaxbn.nnx` hold the layers for Flax, `jaxbn.convert` takes variables
from and to other libraries.
"""

import importlib
import types
import typing

from ._batch_norm import batch_norm as batch_norm
from ._folding import fold as fold
from ._folding import inference_affine as inference_affine
from ._init import init as init
from ._population import population as population
from ._variables import BatchNormParams as BatchNormParams
from ._variables import BatchNormState as BatchNormState

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
