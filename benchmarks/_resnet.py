"""ResNets and their training step, with any class of batch norm.

K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition",
[arXiv:1512.03385](https://arxiv.org/abs/1512.03385), table 1. The stride is in the
3 × 3 convolution, as in later implementations.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

import jaxbn

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


class Stem(nn.Module):
    """Apply a 7 × 7 convolution of stride 2, batch norm and ReLU."""

    norm: type[nn.BatchNorm]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map NHWC images to 64 features."""
        x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=self.dtype)(x)
        return nn.relu(self.norm(use_running_average=False, dtype=self.dtype)(x))


class Stage(nn.Module):
    """Apply bottlenecks of one width, the first with a stride."""

    block: type[Bottleneck]
    norm: type[nn.BatchNorm]
    num_blocks: int
    width: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map NHWC features to `4 * width` features."""
        for i in range(self.num_blocks):
            stride = self.stride if i == 0 else 1
            shape = self.width, stride
            x = self.block(self.norm, *shape, self.dtype, name=f"block_{i}")(x)
        return x


# What the backward pass keeps: all that it reads; the inputs and statistics of batch
# norm, by jaxbn's policy; or the input of each block, by `jax.checkpoint`.
Kept = Literal["everything", "policy", "blocks"]


class ResNet(nn.Module):
    """Compute 1000 logits; 3, 4, 6 and 3 blocks are ResNet-50."""

    norm: type[nn.BatchNorm]
    dtype: DTypeLike
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    kept: Kept = "everything"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map NHWC images to logits, normalized by batch statistics."""
        stem, stage, block = Stem, Stage, Bottleneck
        if self.kept == "policy":
            stem = nn.remat(Stem, policy=jaxbn.checkpoint_policy)
            stage = nn.remat(Stage, policy=jaxbn.checkpoint_policy)
        elif self.kept == "blocks":
            block = nn.remat(block)
        x = stem(self.norm, self.dtype, name="stem")(x)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, num_blocks in enumerate(self.blocks):
            shape = num_blocks, 64 * 2**i, min(i, 1) + 1
            x = stage(block, self.norm, *shape, self.dtype, name=f"stage_{i}")(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def train_step(
    model: ResNet, variables: Variables, images: Array, labels: Array
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


def step_arguments(model: ResNet, batch: int) -> tuple[Any, ...]:
    """Return the shapes of the arguments of `train_step` after the model."""
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), model.dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, images, jax.ShapeDtypeStruct((batch,), jnp.int32)
