"""Input shapes of batch norm in real networks, and extreme shapes."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Hold one input shape of batch norm; `axis` is the feature axis."""

    name: str
    dims: tuple[int, ...]
    axis: int = -1


# A bottleneck block has two narrow layers and a wide one. Batch 32, 224 x 224 images.
RESNET50 = (
    Shape("ResNet-50 stem", (32, 112, 112, 64)),
    Shape("ResNet-50 1 narrow", (32, 56, 56, 64)),
    Shape("ResNet-50 1 wide", (32, 56, 56, 256)),
    Shape("ResNet-50 2 narrow", (32, 28, 28, 128)),
    Shape("ResNet-50 2 wide", (32, 28, 28, 512)),
    Shape("ResNet-50 3 narrow", (32, 14, 14, 256)),
    Shape("ResNet-50 3 wide", (32, 14, 14, 1024)),
    Shape("ResNet-50 4 narrow", (32, 7, 7, 512)),
    Shape("ResNet-50 4 wide", (32, 7, 7, 2048)),
)
# The layers of ResNet-20 on CIFAR in `_step.py`, batch 64.
CIFAR = (
    Shape("CIFAR 1", (64, 32, 32, 16)),
    Shape("CIFAR 2", (64, 16, 16, 32)),
    Shape("CIFAR 3", (64, 8, 8, 64)),
)
OTHERS = (
    Shape("MLP wide", (256, 1024)),
    Shape("MLP", (4096, 256)),
    Shape("tall", (65536, 32)),
    Shape("tiny", (128, 64)),
    Shape("NCHW ResNet-50 1", (32, 64, 56, 56), 1),
    Shape("NCHW CIFAR 1", (64, 16, 32, 32), 1),
)
ALL = RESNET50 + CIFAR + OTHERS
QUICK = (
    Shape("CIFAR 2", (64, 16, 16, 32)),
    Shape("MLP", (4096, 256)),
)


def growing_batch(powers: range, features: int = 256) -> tuple[Shape, ...]:
    """Return shapes with 2ⁱ examples."""
    return tuple(Shape(f"2^{i} examples", (2**i, features)) for i in powers)


def growing_features(powers: range, examples: int = 1024) -> tuple[Shape, ...]:
    """Return shapes with 2ⁱ features."""
    return tuple(Shape(f"2^{i} features", (examples, 2**i)) for i in powers)
