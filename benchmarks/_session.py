"""What all sections share: peers, randomness, progress."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from ._peers import Peer
from ._task import Task


class Session(NamedTuple):
    """One run of the command; `torch` is None where it is missing or not wanted."""

    quick: bool
    seed: int
    rng: np.random.Generator
    console: Console
    peers: dict[str, Peer]
    torch: Any
    torch_names: Sequence[str]

    def track(self, cells: Sequence, name: str) -> Iterable:
        """The cells, with a bar that shows how many are done."""
        return track(cells, f"{name:17}", console=self.console)

    def torch_layouts(self, task: Task) -> list[str]:
        """The layouts of torch to run for this task."""
        if self.torch is None:
            return []
        return [n for n in self.torch.layouts(task) if n in self.torch_names]

    def forget(self) -> None:
        """Let torch drop its arrays."""
        if self.torch is not None:
            self.torch.forget()

    def distinct(self) -> "Session":
        """The same, jaxbn's layers left out where the function stands for them."""
        same = ("jaxbn.linen", "jaxbn.nnx") if "jaxbn" in self.peers else ()
        return self._replace(
            peers={n: p for n, p in self.peers.items() if n not in same}
        )

    def only(self, *names: str) -> "Session":
        """The same, with some of the peers alone."""
        return self._replace(
            peers={n: p for n, p in self.peers.items() if n in names},
            torch_names=[n for n in self.torch_names if n in names],
        )
