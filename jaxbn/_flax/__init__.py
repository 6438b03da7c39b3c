"""Shared by `jaxbn.linen` and `jaxbn.nnx`; imports no Flax."""

from importlib import import_module


def require_flax(package: str) -> None:
    """Say how to install Flax if `package` does not find it."""
    try:
        import_module("flax")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flax":
            raise
        raise ModuleNotFoundError(
            f"{package} needs Flax, which is not installed: pip install 'jaxbn[flax]'",
            name=error.name,
        ) from error
