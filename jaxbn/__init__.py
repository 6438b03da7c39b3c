"""Batch normalization for JAX: a pure function with a closed-form backward pass.

`jaxbn.linen` and `jaxbn.nnx` hold the layers for Flax, `jaxbn.convert` converts
variables from and to other libraries.
"""

import importlib
import types
import typing

from ._core.batch_norm import batch_norm as batch_norm
from ._core.checkpoint import checkpoint_policy as checkpoint_policy
from ._core.normalize import normalize as normalize
from ._core.renorm import batch_renorm as batch_renorm
from ._core.running import update_running_stats as update_running_stats
from ._core.statistics import BatchStatistics as BatchStatistics
from ._core.statistics import batch_statistics as batch_statistics
from ._core.variables import BatchNormParams as BatchNormParams
from ._core.variables import BatchNormState as BatchNormState
from ._core.variables import init as init
from ._inference.affine import inference_affine as inference_affine
from ._inference.folding import fold as fold
from ._inference.merging import merge_states as merge_states
from ._inference.population import population as population

if typing.TYPE_CHECKING:
    from . import convert as convert
    from . import linen as linen
    from . import nnx as nnx

__version__ = "0.1.0"
__all__ = [
    "BatchNormParams",
    "BatchNormState",
    "BatchStatistics",
    "batch_norm",
    "batch_renorm",
    "batch_statistics",
    "checkpoint_policy",
    "fold",
    "inference_affine",
    "init",
    "merge_states",
    "normalize",
    "population",
    "update_running_stats",
]
_SUBMODULES = ("convert", "linen", "nnx")


def __getattr__(name: str) -> types.ModuleType:
    """Import `convert`, `linen` or `nnx` on first use: the core needs no Flax."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES, "__version__"]
