"""Figures of small programs, compared with bytes counted by hand; the list of steps."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _networks, aot
from benchmarks._hlo import Kernel, kernels, traffic
from benchmarks._tpu_hlo import Counts, count

# 1. the mean of 64 of 4096 examples; 2. two sums in one pass over x, which is named
# twice; 3. y in bfloat16, which reads x and also a slice of it; 4. a convolution with
# scratch space and a typed operand; 5. a copy of a predicate.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4096,128]{1,0})}

%add (a: f32[], b: f32[]) -> f32[] {
  %b = f32[] parameter(1)
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%sample (shift: f32[128], rows: f32[4096,128]) -> f32[128] {
  %rows = f32[4096,128]{1,0} parameter(1)
  %shift = f32[128]{0} parameter(0)
  %split = f32[64,64,128]{2,1,0} bitcast(%rows)
  %slice.1 = f32[1,64,128]{2,1,0} slice(%split), slice={[0:1], [0:64], [0:128]}
  %zero = f32[] constant(0)
  %total = f32[128]{0} reduce(%slice.1, %zero), dimensions={0}, to_apply=%add
  ROOT %mean = f32[128]{0} add(%total, %shift)
}

%sums (p.0: f32[4096,128], p.1: f32[4096,128]) -> (f32[128], f32[128]) {
  %p.0 = f32[4096,128]{1,0} parameter(0)
  %p.1 = f32[4096,128]{1,0} parameter(1)
  %zero = f32[] constant(0)
  %left = f32[128]{0} reduce(%p.0, %zero), dimensions={0}, to_apply=%add
  %right = f32[128]{0} reduce(%p.1, %zero), dimensions={0}, to_apply=%add
  ROOT %both = (f32[128]{0}, f32[128]{0}) tuple(%left, %right)
}

%normalize (q: f32[4096,128], mean: f32[128]) -> bf16[4096,128] {
  %q = f32[4096,128]{1,0} parameter(0)
  %mean = f32[128]{0} parameter(1)
  %slice.2 = f32[1,128]{1,0} slice(%q), slice={[0:1], [0:128]}
  %wide = f32[4096,128]{1,0} broadcast(%mean), dimensions={1}
  %deviation = f32[4096,128]{1,0} subtract(%q, %wide)
  ROOT %y = bf16[4096,128]{1,0} convert(%deviation)
}

ENTRY %main (x: f32[4096,128], start: f32[128]) -> (bf16[4096,128], pred[128]) {
  %x = f32[4096,128]{1,0} parameter(0), metadata={op_name="x, the input"}
  %start = f32[128]{0} parameter(1)
  %mean = f32[128]{0} fusion(%start, %x), kind=kInput, calls=%sample
  %two = (f32[128]{0}, /*index=1*/f32[128]{0}) fusion(%x, %x), calls=%sums
  %first = f32[128]{0} get-tuple-element(%two), index=0
  %y = bf16[4096,128]{1,0} fusion(%x, %first), kind=kLoop, calls=%normalize
  %conv = (bf16[64,128]{1,0}, u8[999]{0}) custom-call(bf16[4096,128]{1,0} %y), \
custom_call_target="__cudnn$convForward"
  %mask = pred[128]{0} constant({...})
  %kept = pred[128]{0} copy(%mask)
  ROOT %out = (bf16[4096,128]{1,0}, pred[128]{0}) tuple(%y, %kept)
}
"""
X, VECTOR = 4096 * 128 * 4, 128 * 4
KERNELS = [
    Kernel("mean", read=64 * VECTOR + VECTOR, written=VECTOR),
    Kernel("two", read=X, written=2 * VECTOR),
    Kernel("y", read=X + VECTOR, written=X // 2),
    Kernel("conv", read=X // 2, written=64 * 128 * 2),
    Kernel("kept", read=128, written=128),
]


@pytest.mark.parametrize("expected", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_count_bytes(expected):
    assert expected in kernels(PROGRAM)


def test_traffic_sums_the_entry_computation():
    assert len(kernels(PROGRAM)) == len(KERNELS)
    assert traffic(PROGRAM) == sum(k.read + k.written for k in KERNELS)


@pytest.mark.parametrize(
    ("dtype", "size"), [("f64", 8), ("c64", 8), ("s32", 4), ("f8e4m3fn", 1)]
)
def test_kernels_use_dtype_width(dtype, size):
    hlo = f"""ENTRY %main (x: f32[2,3]) -> {dtype}[2,3] {{
  %x = f32[2,3]{{1,0}} parameter(0)
  ROOT %y = {dtype}[2,3]{{1,0}} convert(%x)
}}
"""
    assert kernels(hlo) == [Kernel("y", read=24, written=6 * size)]


@pytest.mark.parametrize("op", ["while", "conditional", "call"])
def test_traffic_rejects_control_flow(op):
    hlo = PROGRAM.replace("copy(%mask)", f"{op}(%mask), body=%add")
    with pytest.raises(ValueError, match=f"straight-line HLO only; got {op} %kept"):
        traffic(hlo)


# 1. a convolution fused with a sum, whose second operand lies in VMEM; 2. a fusion that
# slices its operand; 3. an asynchronous copy to VMEM; 4. a conditional, of which the
# second branch moves less; 5. a fusion without an estimate of its cycles.
TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%inner (a: bf16[8,128], b: bf16[128,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[128,128]{1,0} parameter(1)
  ROOT %conv = bf16[8,128]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%convolve (c: bf16[8,128], d: bf16[128,128]) -> (bf16[8,128], f32[128]) {
  %c = bf16[8,128]{1,0} parameter(0)
  %d = bf16[128,128]{1,0} parameter(1)
  %x = bf16[8,128]{1,0} fusion(%c, %d), kind=kOutput, calls=%inner
  %zero = f32[] constant(0)
  %total = f32[128]{0} reduce(%x, %zero), dimensions={0}, to_apply=%add
  ROOT %both = (bf16[8,128]{1,0}, f32[128]{0}) tuple(%x, %total)
}

%slices (e: f32[4096,128]) -> f32[64,128] {
  %e = f32[4096,128]{1,0} parameter(0)
  ROOT %part = f32[64,128]{1,0} slice(%e), slice={[0:64], [0:128]}
}

%far (f: f32[128]) -> f32[128] {
  %f = f32[128]{0} parameter(0)
  ROOT %g = f32[128]{0} fusion(%f), calls=%slices, \
backend_config={"estimated_cycles":"900"}
}

%near () -> f32[128] {
  ROOT %h = f32[128]{0} broadcast(), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (p: bf16[8,128], q: bf16[128,128], r: f32[4096,128]) -> f32[128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %r = f32[4096,128]{1,0:T(8,128)} parameter(2)
  %pair = (bf16[8,128]{1,0:T(8,128)}, /*index=1*/f32[128]{0:T(128)}) \
fusion(%p, %q), kind=kOutput, calls=%convolve, \
backend_config={"estimated_cycles":"1000"}
  %start = f32[64,128]{1,0:T(8,128)} fusion(%r), calls=%slices, \
backend_config={"estimated_cycles":"20"}
  %copy = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]) \
copy-start(%start)
  %fast = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%copy)
  %total = f32[128]{0:T(128)} get-tuple-element(%pair), index=1
  %chosen = f32[128]{0:T(128)} conditional(%flag, %total, %none), \
branch_computations={%far, %near}
  ROOT %out = f32[128]{0:T(128)} fusion(%chosen, %fast), calls=%near, \
backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_tpu_counts():
    convolution = 8 * 128 * 2 + (8 * 128 * 2 + VECTOR)
    slicing = 64 * VECTOR + 64 * VECTOR
    copy, near, last = 64 * VECTOR, VECTOR, 2 * VECTOR
    assert count(TPU_PROGRAM) == Counts(
        hbm=convolution + slicing + copy + near + last,
        cycles=1000 + 20 + 7,
        fused_convolutions=1,
    )


def test_tpu_counts_read_the_branches_of_a_predicate():
    named = "true_computation=%far, false_computation=%near"
    program = TPU_PROGRAM.replace("branch_computations={%far, %near}", named)
    assert count(program) == count(TPU_PROGRAM)


@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_aot_compares_every_step_with_flax(chip):
    cases = list(_networks.cases(chip))
    everything = [case for case in cases if case.kept == "everything"]
    pairs = zip(everything[::2], everything[1::2], strict=True)
    assert all(ours._replace(norm="flax") == flax for ours, flax in pairs)
    assert {case.chips for case in cases} == ({1, 4} if chip == "v5e" else {1})
    assert f"Compiling for {chip}: about " in aot.say_how_long(chip, quick=False)


@pytest.mark.parametrize("kept", ["policy", "blocks"])
def test_network_is_the_same_whatever_it_keeps(kept):
    plain, saving = (
        _networks.ResNet(_networks.NORMS["jaxbn"], jnp.dtype("float32"), (1, 1), k)
        for k in ("everything", kept)
    )
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    variables = plain.init(jax.random.key(0), images)
    actual, expected = (
        jax.jit(partial(_networks.train_step, model))(variables, images, np.arange(4))
        for model in (saving, plain)
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-4)
