"""State shared by all sections: libraries, randomness, progress."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from ._libraries import Library
from ._task import Task


class Session(NamedTuple):
    """Hold one run of the command; `torch` is None if missing or not requested."""

    quick: bool
    seed: int
    rng: np.random.Generator
    console: Console
    libraries: dict[str, Library]
    torch: Any
    torch_names: Sequence[str]

    def track(self, cells: Sequence, name: str) -> Iterable:
        """Iterate over `cells` with a progress bar."""
        for cell in track(cells, f"{name:17}", console=self.console):
            yield cell
            gc.collect()  # a `Program` refers to itself: its arrays would accumulate

    def torch_layouts(self, task: Task) -> list[str]:
        """Return the layouts of PyTorch to run for this task."""
        if self.torch is None:
            return []
        return [n for n in self.torch.layouts(task) if n in self.torch_names]

    def release(self) -> None:
        """Free the arrays of PyTorch's process."""
        if self.torch is not None:
            self.torch.release()

    def without_duplicates(self) -> "Session":
        """Drop jaxbn's layers if the function, the same computation, is included."""
        same = ("jaxbn.linen", "jaxbn.nnx") if "jaxbn" in self.libraries else ()
        return self._replace(
            libraries={n: p for n, p in self.libraries.items() if n not in same}
        )

    def only(self, *names: str) -> "Session":
        """Keep only the named libraries."""
        return self._replace(
            libraries={n: p for n, p in self.libraries.items() if n in names},
            torch_names=[n for n in self.torch_names if n in names],
        )
