"""Convert a whole ResNet-18 of PyTorch, with torchvision's names, by one map."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import assert_near

import jaxbn
from jaxbn import convert

torch: Any = pytest.importorskip("torch")
tnn = torch.nn

# Flax promotes dtypes and ranks.
pytestmark = pytest.mark.usefixtures("standard_promotion", "any_rank", "x64")

WIDTH = 8  # 64 in torchvision
CLASSES = 10
STAGES = [(f"layer{i + 1}", WIDTH * 2**i, 1 if i == 0 else 2) for i in range(4)]
NORM: Any = {"momentum": 0.9, "unbiased": True}


class TorchBlock(tnn.Module):
    def __init__(self, features, width, stride):
        super().__init__()
        self.conv1 = torch_conv(features, width, 3, stride)
        self.bn1 = tnn.BatchNorm2d(width)
        self.conv2 = torch_conv(width, width, 3, 1)
        self.bn2 = tnn.BatchNorm2d(width)
        self.downsample = None
        if features != width:
            conv = torch_conv(features, width, 1, stride)
            self.downsample = tnn.Sequential(conv, tnn.BatchNorm2d(width))

    def forward(self, x):
        y = tnn.functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        x = self.downsample(x) if self.downsample else x
        return tnn.functional.relu(x + y)


class TorchResNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch_conv(3, WIDTH, 7, 2)
        self.bn1 = tnn.BatchNorm2d(WIDTH)
        features = WIDTH
        for name, width, stride in STAGES:
            first = TorchBlock(features, width, stride)
            setattr(self, name, tnn.Sequential(first, TorchBlock(width, width, 1)))
            features = width
        self.fc = tnn.Linear(features, CLASSES)

    def forward(self, x):
        x = tnn.functional.relu(self.bn1(self.conv1(x)))
        x = tnn.functional.max_pool2d(x, 3, 2, 1)
        for name, _, _ in STAGES:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


def torch_conv(features, width, size, stride):
    return tnn.Conv2d(features, width, size, stride, size // 2, bias=False)


def flax_conv(size, stride) -> Any:
    """Return the options that give the same convolution in Flax."""
    return {
        "kernel_size": (size, size),
        "strides": stride,
        "padding": size // 2,
        "use_bias": False,
    }


def max_pool(x):
    padding: Any = ((1, 1), (1, 1))
    return nn.max_pool(x, (3, 3), (2, 2), padding)


class LinenBlock(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def conv_norm(x, size, stride, conv, norm):
            x = nn.Conv(self.width, name=conv, **flax_conv(size, stride))(x)
            return jaxbn.linen.BatchNorm(not train, name=norm, **NORM)(x)

        y = nn.relu(conv_norm(x, 3, self.stride, "conv1", "bn1"))
        y = conv_norm(y, 3, 1, "conv2", "bn2")
        if x.shape != y.shape:
            x = conv_norm(x, 1, self.stride, "downsample_0", "downsample_1")
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(WIDTH, name="conv1", **flax_conv(7, 2))(x)
        x = nn.relu(jaxbn.linen.BatchNorm(not train, name="bn1", **NORM)(x))
        x = max_pool(x)
        for name, width, stride in STAGES:
            x = LinenBlock(width, stride, name=f"{name}_0")(x, train)
            x = LinenBlock(width, 1, name=f"{name}_1")(x, train)
        return nn.Dense(CLASSES, name="fc")(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, features, width, stride, rngs):
        self.conv1 = nnx.Conv(features, width, rngs=rngs, **flax_conv(3, stride))
        self.bn1 = jaxbn.nnx.BatchNorm(width, rngs=rngs, **NORM)
        self.conv2 = nnx.Conv(width, width, rngs=rngs, **flax_conv(3, 1))
        self.bn2 = jaxbn.nnx.BatchNorm(width, rngs=rngs, **NORM)
        self.downsample = nnx.List([])
        if features != width:
            conv = nnx.Conv(features, width, rngs=rngs, **flax_conv(1, stride))
            norm = jaxbn.nnx.BatchNorm(width, rngs=rngs, **NORM)
            self.downsample = nnx.List([conv, norm])

    def __call__(self, x):
        y = nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        for layer in self.downsample:
            x = layer(x)
        return nn.relu(x + y)


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, WIDTH, rngs=rngs, **flax_conv(7, 2))
        self.bn1 = jaxbn.nnx.BatchNorm(WIDTH, rngs=rngs, **NORM)
        features = WIDTH
        for name, width, stride in STAGES:
            first = NnxBlock(features, width, stride, rngs)
            setattr(self, name, nnx.List([first, NnxBlock(width, width, 1, rngs)]))
            features = width
        self.fc = nnx.Linear(features, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = max_pool(nn.relu(self.bn1(self.conv1(x))))
        for name, _, _ in STAGES:
            for block in getattr(self, name):
                x = block(x)
        return self.fc(x.mean((1, 2)))


@pytest.fixture
def net(rng) -> Any:
    """Return a float32 ResNet-18 with random weights and running statistics."""
    net = TorchResNet()
    for key, value in net.state_dict().items():
        if value.ndim == 1:
            value.copy_(torch.tensor(rng.uniform(0.5, 1.5, value.shape)))
        elif value.ndim > 1:
            size = np.sqrt(value[0].numel())
            value.copy_(torch.tensor(rng.normal(size=value.shape) / size))
        assert value.ndim or key.endswith("num_batches_tracked")
    return net


@pytest.fixture
def images(rng):
    return rng.normal(size=(2, 3, 32, 32))


def names_of(net):
    """Return the names of all layers of the network that have weights."""
    return {key.rpartition(".")[0] for key in net.state_dict()}


def linen_names(net):
    return {name: re.sub(r"\.(\d)", r"_\1", name) for name in names_of(net)}


def nnx_names(net):
    return {name: name for name in names_of(net)}


def zeros(net):
    return {key: torch.zeros_like(value) for key, value in net.state_dict().items()}


def widened(tree) -> Any:
    return jax.tree.map(lambda array: array.astype(jnp.float64), tree)


def logits_of(net, images):
    return net(torch.tensor(images)).detach().numpy()


def assert_identical(actual, expected):
    """Compare two state_dicts, dtypes included, to the bit."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key


def test_torchvision_names():
    assert len(names_of(TorchResNet())) == 41
    assert {"conv1", "layer1.0.conv1", "layer2.0.downsample.1", "layer4.1.bn2"} < (
        names_of(TorchResNet())
    )


def test_resnet18_infers_and_trains_alike_in_linen(net, images):
    model, names, x = LinenResNet(), linen_names(net), np.moveaxis(images, 1, -1)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    variables: Any = convert.from_torch_tree(net.state_dict(), names, shapes)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    assert_identical(
        convert.to_torch_tree(variables, names, zeros(net)), net.state_dict()
    )
    net, variables = net.double(), widened(variables)
    assert_near(model.apply(variables, x, False), logits_of(net.eval(), images), 1e-9)
    logits, new = model.apply(variables, x, True, mutable=["batch_stats"])
    assert_near(logits, logits_of(net.train(), images), 1e-9)
    trained: Any = convert.from_torch_tree(net.state_dict(), names, variables)
    assert_near(new["batch_stats"], trained["batch_stats"], 1e-9)


def test_resnet18_infers_and_trains_alike_in_nnx(net, images):
    names, x = nnx_names(net), np.moveaxis(images, 1, -1)
    model = nnx.eval_shape(lambda: NnxResNet(nnx.Rngs(0)))
    state = convert.from_torch_tree(net.state_dict(), names, nnx.state(model))
    assert_identical(convert.to_torch_tree(state, names, zeros(net)), net.state_dict())
    net = net.double()
    nnx.update(model, widened(state))
    model.eval()
    assert_near(model(x), logits_of(net.eval(), images), 1e-9)
    model.train()
    assert_near(model(x), logits_of(net.train(), images), 1e-9)
    state = nnx.state(model)
    trained = convert.from_torch_tree(net.state_dict(), names, state)
    assert_near(nnx.to_pure_dict(state), nnx.to_pure_dict(trained), 1e-9)
