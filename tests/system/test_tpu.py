"""Compile a training step for a TPU v5e; skipped without libtpu.

libtpu 0.0.52 dies of a conditional whose branch is handed all results of a fusion, in
its bfloat16 pass. The sums of the forward pass avoid that.
"""

import pytest

from benchmarks import _networks

pytest.importorskip("libtpu")


@pytest.mark.usefixtures("standard_promotion", "any_rank")
def test_forward_sums_stay_in_the_convolutions():
    cases = (
        _networks.Case("stem + 2 bottlenecks", 8, 1, "bfloat16", norm, "everything")
        for norm in ("jaxbn", "flax")
    )
    ours, flax = (_networks.count("v5e", case) for case in cases)
    assert ours["fused"] == flax["fused"] > 0
    assert ours["cycles"] <= 1.1 * flax["cycles"]
