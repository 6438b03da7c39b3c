"""Run every test under the strict settings that a careful user might switch on."""

from contextlib import nullcontext

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import settings

# The default profile draws the same examples in each run, so that no run fails by
# chance. Search for new ones with
# `pytest tests/core/test_properties.py --hypothesis-profile=search`.
settings.register_profile("fixed", derandomize=True, max_examples=40, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("fixed")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--form", help="run every sum in the form of this platform, for instance tpu"
    )
    parser.addoption(
        "--every-row",
        action="store_true",
        help="divide each number of rows from 1 to 64 in core/sums/test_sharded.py",
    )


@pytest.fixture(scope="session", autouse=True)
def form_of_every_sum(request):
    from helpers import forced_form  # not before jaxtyping hooks into its imports

    platform = request.config.getoption("--form")
    with forced_form(platform) if platform else nullcontext():
        yield


ACCURATE = ["batch_norm", "cuda", "forms", "properties", "statistics", "weights"]


@pytest.fixture(scope="module", autouse=True)
def optimizations(request):
    """Optimize machine code only where rounding is tested: it takes most of the time.

    The passes of XLA, whose programs some tests read, are the same without.
    """
    optimized = request.path.stem.removeprefix("test_") in ACCURATE
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1502_03167)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Allow implicit promotion: Flax adds bfloat16 to float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def any_rank():
    """Allow arrays to broadcast with vectors, as the examples do."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def unchecked_types():
    """Pass arguments of wrong types, which jaxtyping would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
