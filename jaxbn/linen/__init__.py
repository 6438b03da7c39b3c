"""Batch norm for Flax linen: the layer, replacement in existing models, inference."""

from .._flax import require_flax

require_flax(__name__)

from ._batch_norm import BatchNorm as BatchNorm
from ._batch_renorm import BatchRenorm as BatchRenorm
from ._folding import fold as fold
from ._mask import batch_norm_mask as batch_norm_mask
from ._population import population as population
from ._replace import replace_batch_norm as replace_batch_norm
from ._skip import skip_folded as skip_folded
