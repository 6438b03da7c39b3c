"""Fine-tuning an nnx model whose batch norms stay as they are."""

from flax import nnx
from jaxtyping import PyTree

from .._flax.paths import check_has_batch_norm
from ._bridge import all_statistics


def batch_norm_mask(model: PyTree) -> PyTree:
    """Mark the batch norms' parameters in an nnx model: a mask for optax.

    Three things can be frozen. The statistics: set
    `model.set_attributes(nnx.BatchNorm, use_running_average=True)` after
    `model.train()`, which resets it, or train through
    `nnx.view(model, use_running_average=True)`, which leaves `model` unchanged. y is
    then affine in x, and so is the gradient that reaches scale, bias and the layers
    before. Scale and bias: give them no update, by this mask. With both frozen the
    layer is constant. The mask's other use is to keep weight decay off scale and bias.

    **Arguments**: `model`, a module, or lists, dicts and other pytrees of modules.

    **Returns** a tree like `nnx.state(model, nnx.Param)`: `True` at `scale` and `bias`
    of each `nnx.BatchNorm`, jaxbn's included, `False` elsewhere.

    **Raises** `ValueError` if there is no batch norm.

    >>> import jaxbn.nnx, optax
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
    >>> mask = jaxbn.nnx.batch_norm_mask(model)
    >>> nnx.to_pure_dict(mask)
    {'layers': {0: {'bias': False, 'kernel': False}, 1: {'bias': True, 'scale': True}}}
    >>> frozen = optax.chain(optax.adam(1e-3), optax.transforms.freeze(mask))
    >>> optimizer = nnx.Optimizer(model, frozen, wrt=nnx.Param)
    """
    norms = all_statistics(model)
    check_has_batch_norm(norms, "the model must have a batch norm; found")
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state(
        [(p, p[:-1] in norms and p[-1] in ("scale", "bias")) for p, _ in flat]
    )
