"""A training step of ResNet-20 for CIFAR, batch 64, with each linen BatchNorm.

He et al., "Deep Residual Learning for Image Recognition", 2015,
[arXiv:1512.03385](https://arxiv.org/abs/1512.03385), section 4.2, with projections.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxbn.linen

from ._programs import Program
from ._session import Session
from ._timing import interleave, sampler, summarize


class NoNorm(nn.Module):
    """Return the input, to time the rest of the step without batch norm."""

    use_running_average: bool = False

    def __call__(self, x: Array) -> Array:
        """Return `x`."""
        return x


NORMS: dict[str, Any] = {
    "jaxbn.linen": jaxbn.linen.BatchNorm,
    "flax.linen": nn.BatchNorm,
    "no batch norm": NoNorm,
}


class ResNet(nn.Module):
    """Compute logits by three stages of `blocks` blocks, 3 in ResNet-20."""

    norm: Any
    blocks: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map NHWC images to logits in training mode."""
        norm = partial(self.norm, use_running_average=False)
        x = nn.relu(norm()(nn.Conv(16, (3, 3), use_bias=False)(x)))
        for width, first in ((16, 1), (32, 2), (64, 2)):
            for stride in (first, 1, 1)[: self.blocks]:
                conv = partial(nn.Conv, width, use_bias=False)
                y = nn.relu(norm()(conv((3, 3), stride)(x)))
                y = norm()(conv((3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv((1, 1), stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


def train_step(model: nn.Module, carry: dict, images: Array, labels: Array) -> dict:
    """Take one step of gradient descent with momentum; `carry` includes the loss."""
    stats = carry["stats"]

    def loss(params: dict) -> tuple[Array, dict]:
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(variables, images, mutable="batch_stats")
        costs = -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
        return costs.mean(), dict(new).get("batch_stats", {})

    (cost, stats), grads = jax.value_and_grad(loss, has_aux=True)(carry["params"])
    trace = jax.tree.map(lambda t, g: 0.9 * t + g, carry["trace"], grads)
    params = jax.tree.map(lambda p, t: p - 0.01 * t, carry["params"], trace)
    return {"params": params, "trace": trace, "stats": stats, "loss": cost}


def initial_carry(model: nn.Module, images: Array, seed: int) -> dict:
    """Initialize the variables with He's method, in NumPy to avoid compiling."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: Any) -> Array:
        if path[-1].key == "kernel":
            std = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(std * rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    params = variables["params"]
    trace = jax.tree.map(jnp.zeros_like, params)
    stats = variables.get("batch_stats", {})
    return {"params": params, "trace": trace, "stats": stats, "loss": jnp.zeros(())}


def run(session: Session) -> dict:
    """Return rows of times and of the first step's losses, which must agree."""
    batch, blocks = (16, 1) if session.quick else (64, 3)
    images = jnp.asarray(session.rng.standard_normal((batch, 32, 32, 3), np.float32))
    labels = jnp.asarray(session.rng.integers(0, 10, batch))
    baseline = () if session.quick else ("no batch norm",)
    names = [n for n in NORMS if n in (*session.libraries, *baseline)]
    programs, samplers = {}, {}
    for name in session.track(names, "step"):
        model = ResNet(NORMS[name], blocks)
        carry = initial_carry(model, images, session.seed)
        programs[name] = Program(partial(train_step, model), carry, images, labels)
        samplers[name] = sampler(programs[name])
    losses = {name: float(p.result()["loss"]) for name, p in programs.items()}
    check_losses_agree(losses)
    rounds, limit = (3, 5) if session.quick else (40, 60)
    samples = interleave(samplers, rounds, session.rng, limit)
    rows = [
        {
            "library": name,
            "batch": batch,
            "layers": 6 * blocks + 2,
            "loss": losses[name],
            "rounds": len(seconds),
        }
        | summarize(seconds)._asdict()
        for name, seconds in samples.items()
    ]
    return {"rows": rows}


def check_losses_agree(losses: dict[str, float]) -> None:
    """Raise `RuntimeError` if the normalized networks have different losses."""
    normalized = [loss for name, loss in losses.items() if name != "no batch norm"]
    if normalized and not np.allclose(normalized, normalized[0], rtol=1e-3):
        raise RuntimeError(f"the losses of one step must agree; they are {losses}")
