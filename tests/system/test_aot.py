"""Memory traffic of a small program, compared with bytes counted by hand."""

import pytest

from benchmarks._hlo import Kernel, kernels, traffic

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
  %slice.1 = f32[64,128]{1,0} slice(%rows), slice={[0:64], [0:128]}
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
