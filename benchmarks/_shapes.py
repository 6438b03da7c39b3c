"""The table of shapes: where batch norm stands in real networks, and the extremes."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One input of batch norm; `axis` is the feature axis."""

    name: str
    dims: tuple[int, ...]
    axis: int = -1


# A bottleneck block has two narrow layers and a wide one; batch 32, 224 x 224 images.
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
# ResNet-20 on CIFAR, batch 64: the layers of the whole step in `_step.py`.
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


def rows_of(counts: range, channels: int = 256) -> tuple[Shape, ...]:
    """Shapes of ever more rows, 2ⁱ of them."""
    return tuple(Shape(f"2^{i} rows", (2**i, channels)) for i in counts)


def channels_of(counts: range, rows: int = 1024) -> tuple[Shape, ...]:
    """Shapes of ever more channels, 2ⁱ of them."""
    return tuple(Shape(f"2^{i} channels", (rows, 2**i)) for i in counts)
