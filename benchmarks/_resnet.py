"""ResNet-50 and its training step, with any class of batch norm.

K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition",
[arXiv:1512.03385](https://arxiv.org/abs/1512.03385), table 1. The stride is in the
3 × 3 convolution, as in later implementations.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

Variables = dict[str, Any]


class Bottleneck(nn.Module):
    """Add 1 × 1, 3 × 3 and 1 × 1 convolutions to a shortcut."""

    norm: type[nn.BatchNorm]
    width: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map NHWC features to `4 * width` features."""
        norm = partial(self.norm, use_running_average=False, dtype=self.dtype)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), self.stride)(y)))
        y = norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """Compute 1000 logits by a 7 × 7 convolution and 16 bottlenecks in 4 stages."""

    norm: type[nn.BatchNorm]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map NHWC images to logits, normalized by batch statistics."""
        x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(self.norm(use_running_average=False, dtype=self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.norm, 64 * 2**stage, stride, self.dtype)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def train_step(
    model: ResNet50, variables: Variables, images: Array, labels: Array
) -> tuple[Variables, Array]:
    """Take one step of SGD; return the new variables and the loss."""

    def loss(params: Variables) -> tuple[Array, Any]:
        old = {**variables, "params": params}
        logits, new = model.apply(old, images, mutable=["batch_stats"])
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return costs.mean(), new

    (cost, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
    return {**new, "params": params}, cost


def step_arguments(model: ResNet50, batch: int) -> tuple[Any, ...]:
    """Return the shapes of the arguments of `train_step` after the model."""
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), model.dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, images, jax.ShapeDtypeStruct((batch,), jnp.int32)
