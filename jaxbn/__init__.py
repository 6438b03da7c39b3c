"""Batch normalization for JAX: a pure function with a closed-form backward."""

from ._batch_norm import batch_norm as batch_norm
from ._init import init as init
from ._variables import BatchNormParams as BatchNormParams
from ._variables import BatchNormState as BatchNormState

__version__ = "0.1.0"
