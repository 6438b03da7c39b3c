"""Shared by `jaxbn.linen` and `jaxbn.nnx`; imports no Flax."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def explain_missing_flax(package: str) -> Iterator[None]:
    """Say how to install Flax if an import of `package` does not find it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flax":
            raise
        raise ModuleNotFoundError(
            f"{package} needs Flax, which is not installed: pip install 'jaxbn[flax]'",
            name=error.name,
        ) from error
