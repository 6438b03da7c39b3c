"""Checkpoints on disk: written by Flax's layers, read into jaxbn's, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
DIRECTIONS = pytest.mark.parametrize(
    "jaxbn_first", [True, False], ids=["jaxbn", "flax"]
)


class LinenModel(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dense(C)(x)
            x = self.norm(use_running_average=not train, param_dtype=jnp.bfloat16)(x)
        return x


class NnxModel(nnx.Module):
    def __init__(self, norm, rngs: nnx.Rngs):
        self.dense = nnx.Linear(C, C, rngs=rngs)
        self.norm = norm(C, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


@pytest.fixture
def x(rng):
    return jnp.asarray(0.7 + 1.9 * rng.normal(size=(8, C)), jnp.float32)


def save_and_restore(path, tree, template):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)


@DIRECTIONS
def test_linen_checkpoint_is_read_by_the_other_library(jaxbn_first, x, tmp_path):
    norms = (jaxbn.linen.BatchNorm, nn.BatchNorm)
    writer, reader = map(LinenModel, norms if jaxbn_first else norms[::-1])
    written: Any = writer.init(jax.random.key(0), x, False)
    _, updates = writer.apply(written, x, True, mutable=["batch_stats"])
    written |= updates
    template = reader.init(jax.random.key(1), x, False)
    read = save_and_restore(tmp_path / "checkpoint", written, template)
    assert_same(read, written, 0)
    assert_same(reader.apply(read, x, False), writer.apply(written, x, False), 1e-5)
    steps = [m.apply(read, x, True, mutable=["batch_stats"]) for m in (reader, writer)]
    assert_same(steps[0], steps[1], 1e-4)


@DIRECTIONS
def test_nnx_checkpoint_is_read_by_the_other_library(jaxbn_first, x, tmp_path):
    norms = (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
    writer, reader = (
        NnxModel(norm, nnx.Rngs(seed))
        for seed, norm in enumerate(norms if jaxbn_first else norms[::-1])
    )
    writer(x)
    written = nnx.state(writer)
    read = save_and_restore(tmp_path / "checkpoint", written, nnx.state(reader))
    assert_same(read, written, 0)
    nnx.update(reader, read)
    for mode in ("eval", "train"):
        ys = []
        for model in (reader, writer):
            getattr(model, mode)()
            ys.append(model(x))
        assert_same(ys[0], ys[1], 1e-5)
    assert_same(nnx.state(reader), nnx.state(writer), 1e-5)
