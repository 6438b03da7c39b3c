"""Fine-tuning an nnx model whose batch norms stay as they are."""

from typing import Any

from flax import nnx

from .._inference.folding_checks import check_has_batch_norm


def batch_norm_mask(model: Any) -> Any:
    """Which of an nnx model's parameters belong to batch norms: a mask for optax.

    Three things can be frozen. The statistics: after `model.train()`, for that sets it
    back, `model.set_attributes(nnx.BatchNorm, use_running_average=True)`, or train
    through `nnx.view(model, use_running_average=True)`, which leaves `model` alone. y
    is then affine in x, and so is the gradient that reaches scale, bias and what is
    before. Scale and bias: give them no update, by this mask. With both frozen nothing
    of the layer moves. To keep weight decay off them is the mask's other use.

    **Arguments**: `model`, a module, or lists, dicts and other pytrees of modules.

    **Returns** a tree like `nnx.state(model, nnx.Param)`: `True` at `scale` and `bias`
    of each `nnx.BatchNorm`, ours included, `False` elsewhere.

    **Raises** `ValueError` where there is no batch norm.

    >>> import jaxbn.nnx, optax
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
    >>> mask = jaxbn.nnx.batch_norm_mask(model)
    >>> nnx.to_pure_dict(mask)
    {'layers': {0: {'bias': False, 'kernel': False}, 1: {'bias': True, 'scale': True}}}
    >>> frozen = optax.chain(optax.adam(1e-3), optax.masked(optax.set_to_zero(), mask))
    >>> optimizer = nnx.Optimizer(model, frozen, wrt=nnx.Param)
    """
    nodes = nnx.iter_graph(model, graph=True)
    norms = {path for path, node in nodes if isinstance(node, nnx.BatchNorm)}
    check_has_batch_norm(norms)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state(
        [(p, p[:-1] in norms and p[-1] in ("scale", "bias")) for p, _ in flat]
    )
